"""The sizes on which bit-exactness rests. They are recorded in every checkpoint.

Attention and every reduction over positions go by absolute tiles of a sequence, never by windows or chunks, and the
rows of every GEMM are padded to a multiple of `row_multiple`: a row's result then depends on its sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Numerics:
    """tile: positions of an attention tile; page: positions of a KV page; row_multiple: padding of GEMM rows."""

    tile: int = 64
    page: int = 16
    row_multiple: int = 4

    def pad(self, rows: int) -> int:
        """`rows` rounded up to the row multiple."""
        return -(-rows // self.row_multiple) * self.row_multiple

    def tiles(self, length: int) -> int:
        """Tiles that cover `length` positions."""
        return -(-length // self.tile)

    def pages(self, length: int) -> int:
        """Pages that cover `length` positions."""
        return -(-length // self.page)


def probe_row_invariance(
    device: torch.device, dtype: torch.dtype, numerics: Numerics, gemm: Callable[..., torch.Tensor] = functional.linear
) -> tuple[int, ...]:
    """Row counts (multiples of row_multiple) for which a GEMM's rows differ from those of a larger GEMM on this
    machine.

    Empty means that the engine's bit-exactness holds here; anything else is a line for the log, since BLAS kernels
    differ between processors.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator).to(device, dtype)
    w = torch.randn(192, 256, generator=generator).to(device, dtype)
    whole = gemm(x, w)
    step = numerics.row_multiple
    return tuple(m for m in range(step, 256, step) if not torch.equal(gemm(x[:m], w), whole[:m]))
