"""Products whose sums are not rounded to what is multiplied, and LoRA's gradients by them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coserve_engine.tensors.lora import AB, Pair


def wide_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a [M, K] b [K, N] as `dtype`, in which it is summed; a CPU has no operator for that, and multiplies wide."""
    if a.dtype is dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    pair: Pair,
    grads: AB,
    drop: Callable[[torch.Tensor], torch.Tensor] | None,
    dx: torch.Tensor | None,
) -> None:
    """What one adapter adds to the gradients of its A and B, in their dtype, and to dx [R, in] where that is there, for
    dy [R, out] and x [R, in] of all rows at once. `drop`: dropout of the inputs to A.
    """
    x = x if drop is None else drop(x)
    low = torch.mm(x, pair.down).mul_(pair.scale)
    dlow = (dy @ pair.b).mul_(pair.scale)
    grads[0].add_(wide_product(dlow.t(), x, grads[0].dtype))
    grads[1].add_(wide_product(dy.t(), low, grads[1].dtype))
    if dx is not None:
        back = dlow @ pair.a
        dx.add_(back if drop is None else drop(back))
