"""Where compiled kernels are kept: in a folder that may outlive a process, beside one that an image brings.

Triton's own manager notes whole paths, so that what it keeps is lost where a folder is mounted elsewhere, and a folder
that cannot be written ends a start. This one notes names, reads what an image brings without writing there, and goes on
in a folder of its own where the other one cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any
from uuid import uuid4

from triton import knobs
from triton.runtime.cache import CacheManager

log = logging.getLogger(__name__)

OURS = "coserve-kernels"
"""The folder in what a user names: its permissions are ours, whatever those of the volume are."""


@dataclass
class Places:
    """Folders of compiled kernels.

    Args:
        written: where new ones go; None: a folder that ends with the process.
        read: an image's own, never written.
    """

    written: Path | None
    read: tuple[Path, ...] = ()
    spare: Path | None = None
    """Where they go that end with the process."""

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(folder for folder in (self.written, *self.read, self.spare) if folder is not None)

    def find(self, key: str, filename: str) -> Path | None:
        for folder in self.folders:
            path = folder / key / filename
            if path.exists():
                return path
        return None

    def put(self, key: str, filename: str, data: bytes) -> Path:
        """Write it whole or not at all. A folder that cannot be written is not tried again."""
        if self.written is not None:
            try:
                return _write(self.written / key, filename, data)
            except OSError as error:
                log.warning("compiled kernels are not kept: %s: %s; make room there, or writable", self.written, error)
                self.read, self.written = (self.written, *self.read), None
        if self.spare is None:
            self.spare = Path(tempfile.mkdtemp(prefix="kernels-"))
            Finalize(None, shutil.rmtree, (self.spare, True), exitpriority=0)  # atexit is not for an engine's process
        return _write(self.spare / key, filename, data)


def _write(folder: Path, filename: str, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    part, path = folder / f".{uuid4().hex}", folder / filename
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a node that goes down leaves no empty kernel to every later start
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return path


class KernelCache(CacheManager):  # type: ignore[misc]
    """Triton's interface, of one key; `places` is of the process."""

    places: Places

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._key = key

    def get_file(self, filename: str) -> str | None:
        found = self.places.find(self._key, filename)
        return None if found is None else str(found)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        content = data if isinstance(data, bytes) else str(data).encode()
        return str(self.places.put(self._key, filename, content))

    def get_group(self, filename: str) -> dict[str, str] | None:
        listed = self.places.find(self._key, f"__grp__{filename}")
        if listed is None:
            return None
        found = {name: self.get_file(name) for name in json.loads(listed.read_text())["child_paths"]}
        return {name: path for name, path in found.items() if path is not None}

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        return self.put(json.dumps({"child_paths": dict.fromkeys(group, "")}), f"__grp__{filename}", binary=False)


def keep(written: Path | None, read: Path | None) -> str:
    """Kernels that this process compiles are kept in `written`, and found there and in `read`. Returns a line for the
    log.

    What is kept is code that later starts run: it lies in a folder of `written` that nobody else may write.
    """
    found = () if read is None or not read.is_dir() else (read,)
    places = Places(None if written is None else _safe(written), found)
    _use(places)
    image = "" if not found else f", and come from {read}"
    return f"compiled kernels are kept in {places.written or 'no folder that outlives this process'}{image}"


def keep_all(folder: Path) -> Places:
    """Kernels that this process compiles are kept in `folder` as it is, for an image to bring.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _try(folder)
    places = Places(folder)
    _use(places)
    return places


def _use(places: Places) -> None:
    knobs.cache.manager_class = type("KernelCache", (KernelCache,), {"places": places})
    knobs.compilation.store_binary_only = True


def _safe(folder: Path) -> Path | None:
    """The folder in `folder` to keep kernels in, made where it is not there; None, with a warning, where it cannot be
    used.
    """
    place = folder / OURS
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH or not _group_is_ours(found):
            who = f"of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}"
            log.warning("compiled kernels are not kept: %s is %s: others could put code there; remove it", place, who)
            return None
        _try(place)
    except OSError as error:
        log.warning("compiled kernels are not kept: %s: %s; mount a folder that can be written", place, error)
        return None
    return place


def _group_is_ours(found: os.stat_result) -> bool:
    """Whether only our own group may write, as a volume's fsGroup makes it."""
    return not found.st_mode & stat.S_IWGRP or found.st_gid == os.getegid()


def _try(folder: Path) -> None:
    """Write there, as a kernel would be."""
    _write(folder, ".tried", b"tried").unlink()
