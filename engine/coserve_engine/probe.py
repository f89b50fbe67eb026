"""Does this machine keep the promise on which bit-exactness rests? Asked once, at start-up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from coserve_engine.numerics import Numerics


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
