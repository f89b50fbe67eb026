"""What a job's steps and evaluations were: the last ones from memory, those before from its checkpoint or adapter."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coserve_agent.jobs.evaluations import EVALUATIONS_FILE, EvalRecord
from coserve_agent.jobs.trainlog import LOG_FILE, StepRecord

log = logging.getLogger(__name__)

KEPT = 10_000
"""Of each job, in memory. Checkpoints are more frequent."""
Record = StepRecord | EvalRecord


class History:
    """Of all jobs that have run since the server began."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Record]] = {}

    def add(self, job: str, record: Record) -> None:
        """After a step or an evaluation. One that is done again, from a checkpoint, takes the place of the first."""
        kept = self._kept.setdefault(job, deque(maxlen=KEPT))
        while kept and _key(kept[-1]) >= _key(record):
            kept.pop()
        kept.append(record)

    def forget(self, job: str) -> None:
        self._kept.pop(job, None)

    async def after(self, job: str, last: tuple[int, int], folder: Path | None) -> list[dict[str, Any]]:
        """The events after `last`, in order. `folder` has the job's logs as of its checkpoint, or its end."""
        kept = list(self._kept.get(job, ()))
        if folder is not None and (not kept or _key(kept[0]) > (last[0] + 1, 0)):
            begin = _key(kept[0]) if kept else (2**62, 0)
            kept = [one for one in await asyncio.to_thread(_recorded, folder) if _key(one) < begin] + kept
        return [_event(one) for one in kept if _key(one) > last]


def place_of(event: dict[str, Any]) -> tuple[int, int]:
    """Where a step's or an evaluation's event stands among the others."""
    return event["step"], int(event["type"] == "evaluation")


def _key(record: Record) -> tuple[int, int]:
    return record.step, int(isinstance(record, EvalRecord))


def _event(record: Record) -> dict[str, Any]:
    if isinstance(record, EvalRecord):
        return {"type": "evaluation", "step": record.step, "loss": record.loss}
    return {
        "type": "step",
        "step": record.step,
        "loss": record.loss,
        "learning_rate": record.lr,
        "grad_norm": record.grad_norm,
        "tokens": record.tokens,
    }


def _recorded(folder: Path) -> list[Record]:
    try:
        steps = [StepRecord(**line) for line in _lines(folder / LOG_FILE)]
        evaluations = [EvalRecord(**line) for line in _lines(folder / EVALUATIONS_FILE)]
    except (OSError, ValueError, TypeError) as error:  # it may just be replaced by a newer one
        log.warning("%s: its logs do not read: %s", folder, error)
        return []
    return sorted((*steps, *evaluations), key=_key)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, _text(path))


def _text(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8") as file:
        return file.readlines()
