"""The page pool as a number: which page is whose, nobody asks here."""

from __future__ import annotations


class PagePool:
    """A cache of `total` pages of which the first belongs to nobody, as in `pages.PageLedger`; `headroom` of the free
    ones are left for those that run already.
    """

    def __init__(self, total: int) -> None:
        self.total = self._free = total - 1
        self.headroom = 0

    def reserve(self, count: int) -> int:
        """Take so many for a newcomer, or none where fewer are free beside the headroom; how many are lacking."""
        lacking = count + self.headroom - self._free
        if lacking > 0:
            return lacking
        self._free -= count
        return 0

    def extend(self) -> bool:
        """Take one more for somebody who runs; whether there was one."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def give(self, count: int) -> None:
        """Give so many back."""
        self._free += count
