"""Free pages as ascending runs, so that the pages of one sequence lie side by side where there is room for it."""

from __future__ import annotations

from bisect import bisect_left


class FreeRuns:
    """Pages first..stop-1, at first all free. Runs are kept apart: two that touch are one."""

    def __init__(self, first: int, stop: int) -> None:
        self._starts = [first] if stop > first else []
        self._stops = [stop] if stop > first else []
        self._count = max(0, stop - first)

    def __len__(self) -> int:
        return self._count

    def take(self, count: int, after: int | None = None) -> tuple[int, ...]:
        """`count` pages, ascending: right behind page `after` if they are free, else of the first run that is long
        enough, else of the first runs there are.

        Raises:
            ValueError: fewer are free.
        """
        if count > self._count:
            raise ValueError(f"{count} pages are wanted and {self._count} are free")
        if after is not None:
            at = bisect_left(self._starts, after + 1)
            if at < len(self._starts) and self._starts[at] == after + 1 and self._length(at) >= count:
                return self._cut(at, count)
        for at in range(len(self._starts)):
            if self._length(at) >= count:
                return self._cut(at, count)
        pages: list[int] = []
        while len(pages) < count:
            pages += self._cut(0, min(count - len(pages), self._length(0)))
        return tuple(pages)

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

    def _cut(self, at: int, count: int) -> tuple[int, ...]:
        if count == 0:
            return ()
        start = self._starts[at]
        if count == self._length(at):
            del self._starts[at], self._stops[at]
        else:
            self._starts[at] = start + count
        self._count -= count
        return tuple(range(start, start + count))
