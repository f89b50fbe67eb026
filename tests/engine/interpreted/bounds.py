"""How far a kernel may be from the truth."""

from __future__ import annotations

import torch

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def close(found: torch.Tensor, true: torch.Tensor | None, dtype: torch.dtype, *, sums: float = 8.0) -> None:
    """Each element of what was computed from inputs of `dtype` is within a few roundings of the truth, and of the size
    of what was summed for it: `sums` times epsilon of the largest of its row.
    """
    assert true is not None
    assert found.shape == true.shape
    epsilon = EPSILON[dtype]
    true = true.detach()
    error = (found.double() - true).abs()
    scale = true.abs().amax(-1, keepdim=True) if true.dim() else true.abs()
    worst = (error - epsilon * true.abs()).div(epsilon * scale + 1e-30).max()
    assert float(worst) <= sums, f"{float(worst):.1f} of epsilon"
    assert not bool(found.isnan().any())
