"""Where the rows of a pass lie: its tiles, their pages, and the place of each row in the cache.

Rows of all its sequences lie one after another, each sequence padded to the row multiple. Tiles are absolute in their
sequence; forward takes them first to last, backward last to first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

from coserve_engine.layout.pages import covering, write_places
from coserve_engine.numerics import Numerics, repeat_last


@dataclass(frozen=True, slots=True)
class TileSpan:
    """Rows [start, stop) of a pass: tile `index` of sequence `seq`; `base` is the sequence's first row."""

    seq: int
    index: int
    base: int
    start: int
    stop: int


def tile_spans(lengths: tuple[int, ...], numerics: Numerics) -> tuple[TileSpan, ...]:
    """The tiles of sequences of these lengths (tokens), in forward order."""
    spans, base = [], 0
    for seq, length in enumerate(lengths):
        padded = numerics.pad(length)
        for index in range(numerics.tiles(padded)):
            start = index * numerics.tile
            spans.append(TileSpan(seq, index, base, base + start, base + min(start + numerics.tile, padded)))
        base += padded
    return tuple(spans)


class TileRows(NamedTuple):
    """Rows of a pass in one tile that carry weight are [first, stop) of a list of rows; with the last of them repeated
    up to a multiple they are [first, end).
    """

    first: int
    stop: int
    end: int


def weighted_rows(
    spans: Sequence[TileSpan], weights: Sequence[float], multiple: int
) -> tuple[list[int], tuple[TileRows, ...]]:
    """The list of rows and, for each of the `spans`, where in it its own are, padded to a multiple; `weights` are of
    all rows of the pass.
    """
    rows: list[int] = []
    tiles = []
    for span in spans:
        found = list(compress(range(span.start, span.stop), weights[span.start : span.stop]))
        padded = repeat_last(found, multiple)
        tiles.append(TileRows(len(rows), len(rows) + len(found), len(rows) + len(padded)))
        rows += padded
    return rows, tuple(tiles)


def pages_of_pass(lengths: tuple[int, ...], numerics: Numerics) -> int:
    """Pages that a pass must reserve."""
    return sum(numerics.pages(numerics.pad(length)) for length in lengths)


@dataclass(frozen=True, slots=True)
class PassLayout:
    """The rows of one pass.

    Args:
        lengths: rows of each sequence, padding included.
        tables: pages of each sequence.
        pages: for each of the `spans`, those up to its tile's end; null pages where the sequence has none.
        tokens, positions, write: of each row: token, position in the sequence, place in the pool.
        training: whether a backward follows.
    """

    lengths: tuple[int, ...]
    spans: tuple[TileSpan, ...]
    tables: tuple[tuple[int, ...], ...]
    pages: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    write: tuple[int, ...]
    training: bool

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], pages: tuple[int, ...], numerics: Numerics, *, training: bool
    ) -> PassLayout:
        """Of the tokens of each sequence, in `pages` (`pages_of_pass` many)."""
        spans = tile_spans(tuple(map(len, sequences)), numerics)
        tokens: list[int] = []
        positions: list[int] = []
        write: list[int] = []
        lengths, tables, taken = [], [], 0
        for sequence in sequences:
            padded = numerics.pad(len(sequence))
            table = pages[taken : taken + numerics.pages(padded)]
            taken += len(table)
            tokens += [*sequence, *([0] * (padded - len(sequence)))]
            positions += range(padded)
            write += write_places(table, 0, padded, numerics)
            lengths.append(padded)
            tables.append(table)
        covered = tuple(covering(tables[span.seq], (span.index + 1) * numerics.tile, numerics) for span in spans)
        return cls(
            tuple(lengths),
            spans,
            tuple(tables),
            covered,
            tuple(tokens),
            tuple(positions),
            tuple(write),
            training,
        )

    @property
    def rows(self) -> int:
        return len(self.tokens)
