"""Products with frozen weights against float64: each element errs by roundings of what was summed for it, a row's bits
are its own, and nothing beyond the ends of rows and widths is read or written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import randn
from mutants import mutant
from paged import within

from coserve_engine.kernels.triton import gemm
from coserve_engine.kernels.triton.gemm import GemmLinear

OUT, INTO = 208, 144
"""Both divide by 16, by no block."""
SUMMED = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-22}
ROUNDED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""What float32 sums may err by, of the sum of their terms' sizes, and what is rounded in the end, of the result."""


def holds(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`found` is x weight^T + bias, element by element."""
    x, weight = x.double(), weight.double()
    true, terms = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        true, terms = true + bias.double(), terms + bias.double().abs()
    dtype = found.dtype
    within(found, true, SUMMED[dtype] * terms + ROUNDED[dtype] * true.abs(), 1.0)


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_products(dtype: torch.dtype, rows: int, back: bool) -> None:
    weight = randn(1, OUT, INTO, dtype=dtype)
    x = randn(2, rows, OUT if back else INTO, dtype=dtype)
    linear = GemmLinear(weight, None, hopper=True)
    found = linear.backward(x) if back else linear.forward(x)
    assert found.dtype is dtype
    holds(found, x, weight.t() if back else weight, None)


@pytest.mark.parametrize(("out", "into"), [(16, 16), (16, 400), (400, 16), (128, 128)])
def test_other_widths_with_a_bias(dtype: torch.dtype, out: int, into: int) -> None:
    weight, bias, x = randn(1, out, into, dtype=dtype), randn(3, out, dtype=dtype), randn(2, 5, into, dtype=dtype)
    linear = GemmLinear(weight, bias, hopper=True)
    holds(linear.forward(x), x, weight, bias)
    dy = randn(4, 5, out, dtype=dtype)
    holds(linear.backward(dy), dy, weight.t(), None)


def test_rows_that_are_apart_and_a_wide_result(dtype: torch.dtype) -> None:
    wide = randn(2, 70, 3 * INTO, dtype=dtype)
    x, weight = wide[:, INTO : 2 * INTO], randn(1, OUT, INTO, dtype=dtype)
    found = gemm.product(x, weight, hopper=True, dtype=torch.float32)
    assert found.dtype is torch.float32
    holds(found, x, weight, None)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_programs_are_alone(dtype: torch.dtype, raced: Any, back: bool) -> None:
    """More blocks of rows than a group has, the last one short."""
    block = gemm.CONFIGURATIONS[dtype, True].sizes["BLOCK_M"]
    weight, x = randn(1, 80, 48, dtype=dtype), randn(2, 9 * block + 3, 80 if back else 48, dtype=dtype)
    (found,) = raced(lambda: (gemm.product(x, weight, hopper=True, back=back),))
    holds(found, x, weight.t() if back else weight, None)


def rows_that_differ(kernels: Any, dtype: torch.dtype, back: bool) -> int:
    """Of all row counts and places, those whose bits are not what they are among 200 rows."""
    weight, x = randn(1, OUT, INTO, dtype=dtype), randn(2, 200, OUT if back else INTO, dtype=dtype)
    whole = kernels.product(x, weight, hopper=True, back=back)
    some = [(at, at + count) for count in (1, 7, 16, 65, 130) for at in (0, 69 - count % 3, 200 - count)]
    parts = [(start, min(stop, 200)) for start, stop in some]
    found = [torch.equal(kernels.product(x[a:b], weight, hopper=True, back=back), whole[a:b]) for a, b in parts]
    return sum(not same for same in found)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_a_row_has_its_own_bits(dtype: torch.dtype, back: bool) -> None:
    assert rows_that_differ(gemm, dtype, back) == 0


def test_columns_alone_have_the_bits_that_they_have_beside_others(dtype: torch.dtype) -> None:
    """Linears of a group are slices of one weight."""
    weight, x = randn(1, OUT, INTO, dtype=dtype), randn(2, 20, INTO, dtype=dtype)
    whole, some = (gemm.product(x, part, hopper=True) for part in (weight, weight[96:176]))
    assert torch.equal(whole[:, 96:176], some)


def test_a_block_that_follows_the_rows_shows(tmp_path: Path) -> None:
    """The control: few rows are summed in smaller blocks."""
    old = "    constants = _constants(width, length, x.stride(0), back, bias is not None, x.dtype, hopper)\n"
    new = old + "    constants = Constants(**constants.named | ({'BLOCK_K': 16} if rows < 32 else {}))\n"
    broken = mutant(gemm, tmp_path, old, new)
    assert rows_that_differ(broken, torch.float32, back=False) > 0
