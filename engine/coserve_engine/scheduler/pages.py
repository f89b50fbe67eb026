"""Who holds which page of the KV cache, and which pages can be found again by what they hold. Only counts, ids and
keys, no tensors.

A page is free, held by one pass, held by one or more requests, or cached: held by nobody, but full of tokens that a
later request may begin with. Cached pages are given away last, and of those the one that was left first, as far as
the pages of a sequence then lie side by side, with room to grow: attention reads neighbours in place, others it must
first copy together (decode of 32 requests takes 1.3 times as long).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coserve_engine.errors import OutOfPagesError
from coserve_engine.scheduler.runs import FreeRuns

NULL_PAGE = 0
"""Padding rows write here and masked tails read from here; it is never owned."""
HEADROOM_PAGES = 1
"""Pages that admission leaves for each running request, so that the next few tokens preempt nobody."""
GROWTH_PAGES = 4
"""Pages that nobody holds between two sequences, where there is room, for the first to grow into; fewer, or none, in a
pool of less than 128.
"""
PLACES_TRIED = 32


@dataclass(slots=True)
class _Holding:
    """Pages of one owner. `tainted`: what it writes may not be finite."""

    pages: list[int]
    tainted: bool


def _nothing(pages: tuple[int, ...]) -> None:
    pass


class PageLedger:
    """Pages 1..total-1 and their owners, named `request:N` or `pass:N`. Only requests share pages.

    `scrub` cleans pages that a tainted owner wrote, when somebody gets them again: until then a forward that is under
    way may write to them. `headroom` is a number of pages that reservations leave for those that run already: `extend`
    may use them.
    """

    def __init__(self, total: int, scrub: Callable[[tuple[int, ...]], None] = _nothing) -> None:
        self.total = total - 1
        self.headroom = 0
        self._growth = min(GROWTH_PAGES, total // 32)
        self._scrub = scrub
        self._runs = FreeRuns(NULL_PAGE + 1, total)
        self._holdings: dict[str, _Holding] = {}
        self._references = [0] * total
        self._held_by_kind: dict[str, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: dict[int, None] = {}
        """Pages that nobody holds but whose content has a key; the one that was left first comes first."""
        self._tainted: set[int] = set()
        """Pages that a tainted owner got and nobody else since."""

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, the cached ones too."""
        return len(self._runs) + len(self._cached)

    @property
    def cached_pages(self) -> int:
        return len(self._cached)

    def held_by(self, kind: str) -> int:
        """Pages held by owners of a kind, "request:" or "pass:"; a shared page counts once."""
        return self._held_by_kind.get(kind, 0)

    def shared(self, page: int) -> bool:
        """Whether writing to the page could be seen by another than its one owner, now or later."""
        return self._references[page] != 1 or page in self._key_of

    # ---- taking and giving back ----

    def reserve(self, owner: str, count: int, prefix: Sequence[int] = (), *, tainted: bool = False) -> tuple[int, ...]:
        """Give `owner` `count` pages, all or none; the first of them are the pages of `prefix`, as `match` found them.

        Raises:
            OutOfPagesError: the rest would cut into the headroom, or is not there; it says how many are lacking.
        """
        if owner in self._holdings:
            raise ValueError(f"{owner} has its pages already")
        fresh = count - len(prefix)
        revived = sum(self._references[page] == 0 for page in prefix)
        lacking = fresh + self.headroom - (self.free_pages - revived)
        if fresh > 0 and lacking > 0:
            raise OutOfPagesError(
                f"{owner} needs {fresh} pages beside {self.headroom} of headroom, and "
                f"{self.free_pages - revived} of {self.total} are free",
                lacking,
            )
        self._holdings[owner] = _Holding([], tainted)
        self._hold(owner, prefix)
        return (*prefix, *self._take(owner, fresh))

    def extend(self, owner: str, count: int) -> tuple[int, ...]:
        """`count` more pages for `owner`, behind its last where they are free; the headroom is for this.

        Raises:
            OutOfPagesError: fewer are free.
        """
        if count > self.free_pages:
            raise OutOfPagesError(
                f"{owner} needs {count} more pages and {self.free_pages} of {self.total} are free",
                count - self.free_pages,
            )
        return self._take(owner, count)

    def free(self, owner: str, *, forget: bool = False) -> None:
        """Take back all pages of `owner`; nothing happens where it has none.

        Pages with a key stay cached, unless `forget` says that their content is of no use.
        """
        holding = self._holdings.pop(owner, None)
        if holding is None:
            return
        left: list[int] = []
        for page in reversed(holding.pages):  # the last of a chain is given away first: without its parent it is lost
            if forget:
                self._drop_key(page)
            self._references[page] -= 1
            if self._references[page]:
                continue
            self._held_by_kind[_kind(owner)] -= 1
            if page in self._key_of:
                self._cached[page] = None
            else:
                left.append(page)
        self._release(left)

    # ---- finding pages by what they hold ----

    def match(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """Pages of the longest beginning of `keys` that is known."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def register(self, page: int, key: bytes) -> None:
        """`page`, which is held, is full and computed, and will not be written again while `key` names it.

        Where another page has that key already, this one stays private.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    # ---- inside ----

    def _take(self, owner: str, count: int) -> tuple[int, ...]:
        holding = self._holdings[owner]
        start = self._place(count, holding.pages[-1] if holding.pages else None) if count else None
        if start is None:
            while len(self._runs) < count:
                self._evict(next(iter(self._cached)))
            pages = self._runs.take(count)
        else:
            for page in range(start, start + count):
                if page in self._cached:
                    self._evict(page)
            pages = self._runs.take_at(start, count)
        self._hold(owner, pages)
        dirty = tuple(page for page in pages if page in self._tainted)
        if dirty:
            self._scrub(dirty)
        if holding.tainted:
            self._tainted.update(pages)
        else:
            self._tainted.difference_update(dirty)
        return pages

    def _place(self, count: int, last: int | None) -> int | None:
        """The first of `count` neighbours that nobody holds: right behind page `last`, else with room to grow on both
        sides, else anywhere; free pages rather than cached ones, and of those the ones that were left first. None
        where there are none.
        """
        if last is not None and self._unheld(last + 1, 1, count) == count:
            return last + 1
        for room in (self._growth, 0):
            free = ((page, page) for page in self._runs.of(count + room))
            cached = ((page - count + 1, page) for page in self._cached)
            for seeds in (free, cached):
                start = self._place_near(seeds, count, room)
                if start is not None:
                    return start
        return None

    def _place_near(self, seeds: Iterable[tuple[int, int]], count: int, room: int) -> int | None:
        """As `_place`, around the first of `seeds` (wanted start, a page that nobody holds) where it is possible."""
        seen: set[int] = set()
        tried = 0
        for wanted, seed in seeds:
            if seed in seen:
                continue
            if tried == PLACES_TRIED:
                break
            tried += 1
            start = seed - self._unheld(seed - 1, -1, count + 2 * room)
            stop = seed + self._unheld(seed, 1, count + 2 * room)
            lowest, highest = start if start == NULL_PAGE + 1 else start + room, stop - room - count
            if lowest <= highest:
                return min(max(wanted, lowest), highest)
            seen.update(range(start, stop))
        return None

    def _unheld(self, page: int, step: int, most: int) -> int:
        """How many pages from `page` on nobody holds, up to `most`; `step` is 1 or -1."""
        count = 0
        while count < most and NULL_PAGE < page <= self.total and not self._references[page]:
            count, page = count + 1, page + step
        return count

    def _evict(self, page: int) -> None:
        """Free a cached page."""
        del self._cached[page]
        self._drop_key(page)
        self._release([page])

    def _hold(self, owner: str, pages: Sequence[int]) -> None:
        for page in pages:
            if self._references[page] == 0:
                self._cached.pop(page, None)
                self._held_by_kind[_kind(owner)] = self._held_by_kind.get(_kind(owner), 0) + 1
            self._references[page] += 1
        self._holdings[owner].pages.extend(pages)

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._runs.give(page)

    def _drop_key(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]


def _kind(owner: str) -> str:
    return owner.partition(":")[0] + ":"
