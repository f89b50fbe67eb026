"""One server a directory: a lock that the kernel lets go when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from coserve_agent.errors import StartError

LOCK = "lock"


class DirectoryLock:
    """Held from here to `release`, or the end of the process.

    Raises:
        StartError: the directory cannot be used, or another server has it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StartError(
                f"COSERVE_STATE is {directory}, which cannot be used ({error.strerror}): name a directory that this "
                "user may write"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise StartError(
                f"COSERVE_STATE is {directory}, which the server with process id {holder} has: end that one, or name "
                "another directory"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another server have the directory."""
        os.close(self._file)
