"""The page pool as a number: which page is whose, nobody asks here."""

from __future__ import annotations


class PagePool:
    """A cache of `total` pages of which the first belongs to nobody, as in `pages.PageLedger`."""

    def __init__(self, total: int) -> None:
        self.total = self._free = total - 1

    def take(self, count: int) -> bool:
        """Take so many, or none where fewer are free; whether they were."""
        if count > self._free:
            return False
        self._free -= count
        return True

    def give(self, count: int) -> None:
        """Give so many back."""
        self._free += count
