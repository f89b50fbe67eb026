"""silu(gate) * up of the MLP and its derivative, in one pass over their elements."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Constants, Kernel, cover

BLOCK = 1024


@triton.jit
def _forward(
    gate_ptr,  # [T, WIDTH], rows GATE_STRIDE apart
    up_ptr,  # likewise UP_STRIDE
    h_ptr,  # [T, WIDTH]
    WIDTH: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=inside).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + row * WIDTH + column, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dh_ptr,  # [R, WIDTH]
    gate_ptr,
    up_ptr,
    both_ptr,  # [R, 2 * WIDTH], written: dgate beside dup
    WIDTH: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    dh = tl.load(dh_ptr + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dh * up * (sigmoid + silu * (1 - sigmoid))
    both = both_ptr + row * (2 * WIDTH) + column
    tl.store(both, dgate.to(both_ptr.dtype.element_ty), mask=inside)
    tl.store(both + WIDTH, (dh * silu).to(both_ptr.dtype.element_ty), mask=inside)


FORWARD, BACKWARD = Kernel(_forward), Kernel(_backward)


@cache
def _constants(width: int, gate_stride: int, up_stride: int) -> Constants:
    return Constants(WIDTH=width, GATE_STRIDE=gate_stride, UP_STRIDE=up_stride, BLOCK=BLOCK)


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [T, I], whose rows may be apart -> silu(gate) * up [T, I], computed in float32."""
    rows, width = gate.shape
    h = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    constants = _constants(width, gate.stride(0), up.stride(0))
    FORWARD.launch((rows, cover(width, BLOCK)), constants, gate, up, h)
    return h


def backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) [R, I] of `forward` for dh [R, I], which lies in one piece; side by side in one tensor."""
    rows, width = dh.shape
    both = torch.empty(rows, 2 * width, dtype=dh.dtype, device=dh.device)
    constants = _constants(width, gate.stride(0), up.stride(0))
    BACKWARD.launch((rows, cover(width, BLOCK)), constants, dh, gate, up, both)
    dgate, dup = torch.split(both, width, 1)
    return dgate, dup
