"""What proves kernels here is proven itself: an interpreter that computes as a GPU does, and sees what races."""

from __future__ import annotations

import faithful
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _product(x_ptr, y_ptr, z_ptr, K: tl.constexpr):
    m, k = tl.arange(0, 16), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * 16 + m[None, :])
    tl.store(z_ptr + m[:, None] * 16 + m[None, :], tl.dot(x, y))


@triton.jit
def _added(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(x_ptr + at))


@triton.jit
def _shared(y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), tl.program_id(0))


@triton.jit
def _chained(y_ptr):
    at = y_ptr + tl.program_id(0)
    tl.store(at + 1, tl.load(at) + 1)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    x = torch.tensor([1.01171875, 1.00390625, -2.51, 1e-40, 3e38, float("nan"), float("inf"), 65535.0] * 2)
    y = torch.zeros(16, dtype=torch.bfloat16)
    _copy[(1,)](x, y, N=16)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_a_dot_of_bfloat16_multiplies_numbers() -> None:
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    z = torch.zeros(16, 16)
    _product[(1,)](x, y, z, K=16)
    assert torch.allclose(z.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [lambda x: _added[(1,)](x, x, N=16), lambda x: _product[(1,)](x, x, x, K=8)])
def test_what_a_gpu_would_not_do_is_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises((TypeError, ValueError, InterpreterError)):
        bad(torch.zeros(256, dtype=torch.bfloat16))


def test_programs_that_share_an_address_are_seen() -> None:
    y = torch.zeros(16, dtype=torch.int32)
    with faithful.watch() as seen:
        _shared[(2,)](y, N=16)
    assert len(seen.clashes()) == 16
    with faithful.watch() as seen:
        _shared[(1,)](y, N=16)
    assert seen.clashes() == []


def test_a_program_that_reads_what_another_wrote_is_seen() -> None:
    y = torch.zeros(9, dtype=torch.int32)
    with faithful.watch() as seen:
        _chained[(8,)](y)
    assert len(seen.clashes()) == 7
    orders = set()
    for seed in range(5):
        faithful.order(seed)
        _chained[(8,)](y.zero_())
        orders.add(tuple(y.tolist()))
    assert len(orders) > 1
