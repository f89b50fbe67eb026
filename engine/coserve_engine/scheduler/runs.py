"""Free pages as ascending runs, so that the pages of one sequence lie side by side where there is room for it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class FreeRuns:
    """Pages first..stop-1, at first all free. Runs are kept apart: two that touch are one."""

    def __init__(self, first: int, stop: int) -> None:
        self._starts = [first] if stop > first else []
        self._stops = [stop] if stop > first else []
        self._count = max(0, stop - first)

    def __len__(self) -> int:
        return self._count

    def take(self, count: int) -> tuple[int, ...]:
        """`count` pages, ascending: of the first run that is long enough, else of the first runs there are.

        Raises:
            ValueError: fewer are free.
        """
        if count > self._count:
            raise ValueError(f"{count} pages are wanted and {self._count} are free")
        for at in range(len(self._starts)):
            if self._length(at) >= count:
                return self._cut(at, count)
        pages: list[int] = []
        while len(pages) < count:
            pages += self._cut(0, min(count - len(pages), self._length(0)))
        return tuple(pages)

    def take_at(self, start: int, count: int) -> tuple[int, ...]:
        """Pages start..start + count - 1, all of which are free."""
        at = bisect_right(self._starts, start) - 1
        return self._cut(at, count, start - self._starts[at])

    def of(self, count: int) -> Iterator[int]:
        """The first pages of runs of at least `count`, ascending."""
        return (start for start, stop in zip(self._starts, self._stops, strict=True) if stop - start >= count)

    def give(self, page: int) -> None:
        """`page` is free again."""
        at = bisect_left(self._starts, page)
        behind = at > 0 and self._stops[at - 1] == page
        before = at < len(self._starts) and self._starts[at] == page + 1
        if behind and before:
            self._stops[at - 1] = self._stops.pop(at)
            del self._starts[at]
        elif behind:
            self._stops[at - 1] = page + 1
        elif before:
            self._starts[at] = page
        else:
            self._starts.insert(at, page)
            self._stops.insert(at, page + 1)
        self._count += 1

    def _length(self, at: int) -> int:
        return self._stops[at] - self._starts[at]

    def _cut(self, at: int, count: int, skipped: int = 0) -> tuple[int, ...]:
        """`count` pages of run `at`, behind its first `skipped`."""
        if count == 0:
            return ()
        first, stop = self._starts[at], self._stops[at]
        start = first + skipped
        rest = [(a, b) for a, b in ((first, start), (start + count, stop)) if a < b]
        self._starts[at : at + 1] = [a for a, _ in rest]
        self._stops[at : at + 1] = [b for _, b in rest]
        self._count -= count
        return tuple(range(start, start + count))
