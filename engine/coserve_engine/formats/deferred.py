"""Work on files in a thread of its own, so that no iteration waits for a disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from coserve_engine.errors import AdapterFolderError, CheckpointError

T = TypeVar("T")
FileError = OSError | AdapterFolderError | CheckpointError
"""What files are to blame for; anything else is our own mistake and ends the engine."""


class FileWork:
    """One thread, first come, first served; what came of a piece of work is handled in the engine's own thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "files")
        self._waiting: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    @property
    def idle(self) -> bool:
        return not self._waiting

    def defer(self, work: Callable[[], T], then: Callable[[T], None], failed: Callable[[FileError], None]) -> None:
        """Run `work` in the thread; a later `collect` calls `then` with its result, or `failed`."""
        future = self._thread.submit(work)

        def settle() -> None:
            try:
                result = future.result()
            except (OSError, AdapterFolderError, CheckpointError) as error:
                failed(error)
            else:
                then(result)

        self._waiting.append((future.done, settle))

    def collect(self) -> None:
        """Handle what is done, in the order in which it was given.

        Raises:
            Exception: work failed in a way that no file is to blame for.
        """
        while self._waiting and self._waiting[0][0]():
            _, settle = self._waiting.popleft()
            settle()
