"""What the time of a forward and of a backward unit depends on: counts that planner, simulator and executor share."""

from __future__ import annotations

from typing import NamedTuple

Features = tuple[float, ...]


class ForwardWork(NamedTuple):
    """Counts of one forward. `kv_rows`: keys gathered by all attention calls; `pairs`: query-key pairs."""

    decode: int = 0
    prefill: int = 0
    finetune: int = 0
    calls: int = 0
    kv_rows: int = 0
    pairs: int = 0

    def plus(self, other: ForwardWork) -> ForwardWork:
        """The counts of both in one forward."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return ForwardWork(a + u, b + v, c + w, d + x, e + y, f + z)

    @property
    def rows(self) -> int:
        return self[0] + self[1] + self[2]

    @property
    def empty(self) -> bool:
        return self.rows == 0

    def features(self) -> Features:
        a, b, c, d, e, f = self
        return (1.0, a, b, c, d, e / 1e3, f / 1e5)


class UnitWork(NamedTuple):
    """Counts of one backward unit; a head unit has no pairs."""

    head: bool
    rows: int
    tiles: int
    pairs: int

    def features(self) -> Features:
        return (1.0, self.rows, self.tiles, self.pairs / 1e5)


NO_WORK = ForwardWork()


def decode_work(contexts: list[int], tile: int) -> ForwardWork:
    """One decode row for each sequence; `contexts` are its tokens in the cache."""
    kv_rows = sum((context // tile + 1) * tile for context in contexts)
    count = len(contexts)
    return ForwardWork(count, 0, 0, count, kv_rows, 4 * kv_rows)


def prefill_work(start: int, length: int, tile: int) -> ForwardWork:
    """Rows [start, start + length) of a sequence."""
    calls = kv_rows = pairs = 0
    position, end = start, start + length
    while position < end:
        tile_end = (position // tile + 1) * tile
        count = min(end, tile_end) - position
        calls, kv_rows, pairs = calls + 1, kv_rows + tile_end, pairs + max(count, 4) * tile_end
        position += count
    return ForwardWork(0, length, 0, calls, kv_rows, pairs)
