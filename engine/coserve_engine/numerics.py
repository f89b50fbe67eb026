"""The sizes on which bit-exactness rests. They are recorded in every checkpoint.

Attention and every reduction over positions go by absolute tiles of a sequence, never by windows or chunks, and the
rows of every GEMM are padded to a multiple of `row_multiple`: a row's result then depends on its sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
HEAD_ROWS = 2048
"""Rows of a pass that meet the head at once, where no bits are promised."""


def repeat_last(values: list[T], multiple: int) -> list[T]:
    """`values` with the last one repeated up to a multiple of so many; none stay none."""
    return values + values[-1:] * (-len(values) % multiple)


@dataclass(frozen=True, slots=True)
class Numerics:
    """tile: positions of an attention tile; page: positions of a KV page; row_multiple: padding of GEMM rows."""

    tile: int = 64
    page: int = 64
    row_multiple: int = 4

    def pad(self, rows: int) -> int:
        """`rows` rounded up to the row multiple."""
        return -(-rows // self.row_multiple) * self.row_multiple

    def tiles(self, length: int) -> int:
        """Tiles that cover `length` positions."""
        return -(-length // self.tile)

    def reaches(self, windows: Sequence[int | None]) -> tuple[int | None, ...]:
        """For each window (keys that a row sees, its own included), the keys in whole tiles before a tile's end that
        any row of the tile may see; None: all.
        """
        return tuple(None if w is None else (1 - -(w - 1) // self.tile) * self.tile for w in windows)

    def pages(self, length: int) -> int:
        """Pages that cover `length` positions."""
        return -(-length // self.page)
