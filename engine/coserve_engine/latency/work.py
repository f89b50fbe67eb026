"""What the time of a forward and of a backward unit depends on: counts that planner, simulator and executor share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Features = tuple[float, ...]
Reaches = tuple[tuple[int, float], ...]
"""(keys before a tile's end that a window reaches, share of the layers that have it); other layers read all keys."""
make = tuple.__new__
"""(type, its fields) -> a named tuple, in less than half of the time that the type's own constructor takes. For what is
made for each row of each iteration.
"""


class ForwardWork(NamedTuple):
    """Counts of one forward. `kv_rows`: keys that all attention calls of a layer read; `pairs`: query-key pairs; both
    are means over the layers.
    """

    decode: int = 0
    prefill: int = 0
    finetune: int = 0
    calls: int = 0
    kv_rows: float = 0
    pairs: float = 0

    def plus(self, other: ForwardWork) -> ForwardWork:
        """The counts of both in one forward."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return make(ForwardWork, (a + u, b + v, c + w, d + x, e + y, f + z))

    def less(self, other: ForwardWork) -> ForwardWork:
        """The counts without those of `other`."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return make(ForwardWork, (a - u, b - v, c - w, d - x, e - y, f - z))

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
    pairs: float

    def features(self) -> Features:
        _, rows, tiles, pairs = self
        return (1.0, rows, tiles, pairs / 1e5)


NO_WORK = ForwardWork()


def mean_reaches(layers: Sequence[int | None]) -> Reaches:
    """Of the reaches of each layer (`Numerics.reaches`)."""
    counts = Counter(reach for reach in layers if reach is not None)
    return tuple((reach, count / len(layers)) for reach, count in sorted(counts.items()))


def keys_read(tile_end: int, reaches: Reaches) -> float:
    """Keys that a layer reads for rows of the tile which ends there, on average over layers."""
    return tile_end - sum(share * max(0, tile_end - reach) for reach, share in reaches)


def decode_work(contexts: list[int], tile: int, reaches: Reaches = ()) -> ForwardWork:
    """One decode row for each sequence; `contexts` are its tokens in the cache."""
    count = len(contexts)
    if reaches:
        kv_rows = sum([keys_read((context // tile + 1) * tile, reaches) for context in contexts])
    else:
        kv_rows = tile * (count + sum([context // tile for context in contexts]))
    return make(ForwardWork, (count, 0, 0, count, kv_rows, 4 * kv_rows))


def prefill_work(start: int, length: int, tile: int, reaches: Reaches = ()) -> ForwardWork:
    """Rows [start, start + length) of a sequence."""
    calls, kv_rows, pairs = 0, 0.0, 0.0
    position, end = start, start + length
    while position < end:
        tile_end = (position // tile + 1) * tile
        count = (tile_end if tile_end < end else end) - position
        keys = keys_read(tile_end, reaches) if reaches else tile_end
        calls, kv_rows, pairs = calls + 1, kv_rows + keys, pairs + (count if count > 4 else 4) * keys
        position += count
    return make(ForwardWork, (0, length, 0, calls, kv_rows, pairs))
