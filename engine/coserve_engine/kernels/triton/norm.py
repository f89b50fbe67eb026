"""RMSNorm of x + residual and its derivative, a row a program: what is read of a row is read once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Constants, Kernel, power_of_two


@triton.jit
def _forward(
    x_ptr,  # [N, WIDTH]; where ADDS, the sum takes its place
    residual_ptr,  # [N, WIDTH], read where ADDS
    weight_ptr,  # [WIDTH]
    normed_ptr,  # [N, WIDTH]
    rstd_ptr,  # [N], float32
    ADDS: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two from WIDTH on
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        total = (x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # the norm is of what is kept
    rstd = tl.rsqrt(tl.sum(x * x) / WIDTH + EPS)
    tl.store(normed_ptr + at, (x * rstd * weight).to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward(
    dy_ptr,  # [N, WIDTH], in any dtype
    x_ptr,  # [N, WIDTH], what was normalised
    rstd_ptr,  # [N], float32
    weight_ptr,  # [WIDTH]
    residual_ptr,  # [N, WIDTH], read where ADDS
    dx_ptr,  # [N, WIDTH]
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)  # on its way while the row is summed
    rstd = tl.load(rstd_ptr + row)
    share = tl.sum(g * x) / WIDTH * (rstd * rstd)
    dx = (g - x * share) * rstd
    if ADDS:
        dx += residual.to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _by_block(function: object) -> dict[int, Kernel]:
    """A kernel for each block: a thread has at most 16 elements of a row."""
    return {1 << n: Kernel(function, warps=min(max(1 << n >> 9, 1), 16)) for n in range(15)}


FORWARD, BACKWARD = _by_block(_forward), _by_block(_backward)
"""By block, for rows of up to 16,384 elements."""


@cache
def _constants(width: int, adds: bool, eps: float | None) -> tuple[int, Constants]:
    """Block, and constants; without `eps`, those of the derivative."""
    block = power_of_two(width)
    if eps is None:
        return block, Constants(ADDS=adds, WIDTH=width, BLOCK=block)
    return block, Constants(ADDS=adds, EPS=eps, WIDTH=width, BLOCK=block)


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm as transformers' Llama defines it, of x + residual as it is stored.

    Args:
        x, residual: [N, H], each in one piece. The sum takes x's place.
        weight: [H].

    Returns:
        x + residual, the normalised rows [N, H], and 1 / rms [N, 1] in float32.
    """
    rows, width = x.shape
    normed = torch.empty_like(x)
    rstd = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block, constants = _constants(width, residual is not None, eps)
    FORWARD[block].launch((rows,), constants, x, x if residual is None else residual, weight, normed, rstd)
    return x, normed, rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [N, H] of `forward` for the normalised rows' dy, plus residual, rounded once to x's dtype.

    Args:
        dy, residual: [N, H], each in one piece, in any dtype.
        x, rstd: what `forward` gave: the sum [N, H], and [N, 1].
        weight: [H].
    """
    rows, width = x.shape
    dx = torch.empty_like(x)
    block, constants = _constants(width, residual is not None, None)
    BACKWARD[block].launch((rows,), constants, dy, x, rstd, weight, dy if residual is None else residual, dx)
    return dx
