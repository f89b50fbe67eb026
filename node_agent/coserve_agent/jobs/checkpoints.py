"""The checkpoint folders of a job: which one to resume from, and which are no longer needed."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.trainlog import STATE_FILE
from coserve_api.job_status import FailedReason
from coserve_contract.messages import Checkpoint
from coserve_engine.errors import CheckpointError
from coserve_engine.formats.folders import restore_folder, verify_folder
from coserve_engine.formats.opened import read_text

log = logging.getLogger(__name__)

_EPOCH, _STEP = re.compile(r"e([1-9][0-9]*)"), re.compile(r"s([0-9]+)")
_PART = re.compile(r"\.s[0-9]+\.(?:part|old)")
# The operator's status may name the one before the last for a moment, so it must outlive the last one's acceptance.
MIN_KEEP = 2
VERIFY_TRIES = 2
VERIFY_PAUSE_S = 2.0
_NOT_LIKE_OURS = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Folder:
    """One checkpoint folder on disk."""

    epoch: int
    step: int
    path: Path


@dataclass
class CheckpointStore:
    """The folders of one job, as the holder of `epoch` sees them."""

    artifacts: Path
    job: str
    epoch: int
    keep: int
    rewound: str = ""
    """Why the accepted checkpoint was not the one to resume from, for the user."""
    _accepted: list[Folder] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.artifacts / "jobs" / self.job

    def relative(self, step: int) -> str:
        """Where this epoch's checkpoint of `step` goes, below the artifact store."""
        return f"jobs/{self.job}/e{self.epoch}/s{step}"

    async def choose(self, accepted: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint to resume from: the accepted one if it is whole, else the newest older one that is.

        Raises:
            JobFailedError: the accepted one is corrupt and there is no other.
        """
        if accepted is None:
            return None
        problem = await self._problem(accepted)
        if problem is None:
            self._accepted = [Folder(accepted.epoch, accepted.step, self.artifacts / accepted.path)]
            return accepted
        log.error("job %s: checkpoint of step %d cannot be used: %s", self.job, accepted.step, problem)
        older = await asyncio.to_thread(self._newest_whole, accepted.step)
        if older is None:
            raise JobFailedError(
                FailedReason.ARTIFACT_STORE_ERROR,
                f"the checkpoint of step {accepted.step} is corrupt and no older one is whole: {problem}; restore the "
                "folder, or create the job again; where resumeFrom names it, look at its sha256",
            )
        log.warning("job %s: going on from the older checkpoint of step %d", self.job, older.step)
        self.rewound = f"the checkpoint of step {accepted.step} cannot be used: {problem}"
        self._accepted = [Folder(older.epoch, older.step, self.artifacts / older.path)]
        return older

    async def _problem(self, accepted: Checkpoint) -> str | None:
        """What is wrong with it. A shared volume may show a folder late, so it is looked at more than once."""
        problem = None
        for attempt in range(VERIFY_TRIES):
            if attempt:
                await asyncio.sleep(VERIFY_PAUSE_S)
            try:
                await asyncio.to_thread(_verify, self.artifacts, self.artifacts / accepted.path, accepted.sha256)
                return None
            except (CheckpointError, OSError) as error:
                problem = str(error)
        return problem

    def _newest_whole(self, below_step: int) -> Checkpoint | None:
        older = [folder for folder in self._folders() if folder.step < below_step and folder.epoch <= self.epoch]
        for folder in sorted(older, key=lambda one: (one.step, one.epoch), reverse=True):
            try:
                sha256 = _verify(self.artifacts, folder.path)
                step = int(json.loads(read_text(folder.path, STATE_FILE))["step"])
            except (CheckpointError, OSError, ArithmeticError, *_NOT_LIKE_OURS) as error:
                log.warning("job %s: %s cannot be used either: %s", self.job, folder.path, error)
                continue
            path = folder.path.relative_to(self.artifacts).as_posix()
            return Checkpoint(step=step, cursor=step, epoch=folder.epoch, path=path, sha256=sha256)
        return None

    async def accepted(self, step: int) -> None:
        """A checkpoint of this epoch was accepted: remove what `keep` newer ones make superfluous."""
        self._accepted.append(Folder(self.epoch, step, self.artifacts / self.relative(step)))
        del self._accepted[: -max(self.keep, MIN_KEEP)]
        await asyncio.to_thread(self._collect, {folder.path for folder in self._accepted}, step)

    def _collect(self, kept: set[Path], newest_step: int) -> None:
        """Delete folders of this job that are neither kept nor newer (one may just be being written)."""
        try:
            for folder in self._folders():
                newer = folder.epoch > self.epoch or (folder.epoch == self.epoch and folder.step > newest_step)
                if folder.path not in kept and not newer:
                    shutil.rmtree(folder.path)
            for epoch, path in _numbered(self.root, _EPOCH):
                if epoch < self.epoch:
                    for part in [one for one in path.iterdir() if _PART.fullmatch(one.name)]:
                        shutil.rmtree(part)
                    if not any(path.iterdir()):
                        path.rmdir()
        except OSError as error:
            log.warning("job %s: old checkpoints could not be removed: %s", self.job, error)

    def _folders(self) -> Iterator[Folder]:
        for epoch, path in _numbered(self.root, _EPOCH):
            for step, folder in _numbered(path, _STEP):
                yield Folder(epoch, step, folder)


def _verify(artifacts: Path, path: Path, sha256: str | None = None) -> str:
    """Check a folder; the holder of the lease is its only writer, so it also ends a replacement that was cut short."""
    restore_folder(path)
    return verify_folder(path, sha256, artifacts)


def _numbered(root: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    return [
        (int(match[1]), path) for path in root.iterdir() if (match := pattern.fullmatch(path.name)) and path.is_dir()
    ]
