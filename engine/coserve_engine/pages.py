"""Who owns which page of the KV cache. Only counts and ids: the simulator and the engine can share it."""

from __future__ import annotations

from coserve_engine.errors import OutOfPagesError

NULL_PAGE = 0
"""Padding rows write here and masked tails read from here; it is never owned."""


class PageLedger:
    """Pages 1..total-1, each free or owned by one owner (a request or a pass)."""

    def __init__(self, total: int) -> None:
        self.total = total - 1
        self._free = list(range(total - 1, NULL_PAGE, -1))
        self._owned: dict[str, tuple[int, ...]] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def held_by(self, prefix: str) -> int:
        """Pages held by owners whose name begins with `prefix`."""
        return sum(len(pages) for owner, pages in self._owned.items() if owner.startswith(prefix))

    def reserve(self, owner: str, count: int) -> tuple[int, ...]:
        """Give `owner` `count` pages, all or none.

        Raises:
            OutOfPagesError: fewer than `count` are free.
        """
        if owner in self._owned:
            raise ValueError(f"{owner} has its pages already")
        if count > len(self._free):
            raise OutOfPagesError(f"{owner} needs {count} pages and {len(self._free)} of {self.total} are free")
        pages = tuple(self._free.pop() for _ in range(count))
        self._owned[owner] = pages
        return pages

    def free(self, owner: str) -> None:
        """Take back all pages of `owner`; nothing happens where it has none."""
        self._free.extend(reversed(self._owned.pop(owner, ())))
