"""RMSNorm of a sum and its derivative against torch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from mutants import mutant
from torch.nn import functional

from coserve_engine.kernels.triton import norm

EPS = 1e-5
SHAPES = [(1, 16), (3, 96), (5, 72), (2, 1040)]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fenced(rows: torch.Tensor) -> torch.Tensor:
    """`rows` with NaN before the first and behind the last."""
    room = torch.full((rows.shape[0] + 4, rows.shape[1]), float("nan"), dtype=rows.dtype)
    room[2:-2] = rows
    return room[2:-2]


def check(of: Any, raced: Any, dtype: torch.dtype, rows: int, width: int, *, adds: bool) -> None:
    """Forward and backward of `of`, with and without a residual."""
    x, weight = drawn(0, rows, width, dtype=dtype), drawn(1, width, dtype=dtype)
    residual = fenced(drawn(2, rows, width, dtype=dtype)) if adds else None
    first = fenced(x)
    total, normed, rstd = raced(lambda: of.forward(first.copy_(x), weight, EPS, residual))
    assert total is first
    assert torch.equal(total, x if residual is None else x + residual)
    wide = total.double().requires_grad_()
    true = functional.rms_norm(wide, (width,), weight.double(), EPS)
    close(normed, true, dtype, sums=1)
    assert rstd.dtype == torch.float32
    close(rstd, wide.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt(), torch.float32, sums=2)
    for dy_dtype in {dtype, torch.float32}:
        dy = fenced(drawn(3, rows, width, dtype=dy_dtype))
        (dx,) = raced(lambda dy=dy: (of.backward(dy, total, rstd, weight, residual),))
        assert dx.dtype == dtype
        (expected,) = torch.autograd.grad(true, wide, dy.double(), retain_graph=True)
        close(dx, expected if residual is None else expected + residual.double(), dtype, sums=4)


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "sum"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm(raced: Any, dtype: torch.dtype, rows: int, width: int, adds: bool) -> None:
    check(norm, raced, dtype, rows, width, adds=adds)


def test_no_rows(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(0, 16, dtype=dtype), torch.ones(16, dtype=dtype)
    total, normed, rstd = norm.forward(x, weight, EPS, x)
    assert (total.shape, normed.shape, rstd.shape) == ((0, 16), (0, 16), (0, 1))
    assert norm.backward(x, x, rstd, weight).shape == (0, 16)


def test_each_element_counts_once(dtype: torch.dtype) -> None:
    """A row for each element, in which it alone is large: what it is divided by tells whether it was summed."""
    width = 40
    x = (torch.eye(width) * 1000).to(dtype)
    normed, rstd = norm.forward(x, torch.ones(width, dtype=dtype), EPS)[1:]
    close(normed, torch.eye(width).double() * width**0.5, dtype, sums=1)
    dy = torch.eye(width, dtype=dtype)
    dx = norm.backward(dy, torch.ones(width, width, dtype=dtype), torch.ones_like(rstd), torch.ones(width, dtype=dtype))
    close(dx, torch.eye(width).double() - 1 / width, dtype, sums=1)


def test_a_row_that_is_not_finite_is_alone(dtype: torch.dtype) -> None:
    x, weight = drawn(0, 3, 24, dtype=dtype), drawn(1, 24, dtype=dtype)
    alone = norm.forward(x.clone(), weight, EPS)[1]
    x[1, 5] = float("inf")
    _, normed, rstd = norm.forward(x, weight, EPS)
    assert torch.equal(normed[::2], alone[::2])
    assert not normed[1].isfinite().all()
    assert norm.backward(x, x, rstd, weight)[::2].isfinite().all()


LOADED = "tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)"
MUTANTS = {
    "a row that ends early": ("inside = column < WIDTH", "inside = column < WIDTH - 1"),
    "a row that ends late": ("tl.load(x_ptr + at, mask=inside, other=0.0)", "tl.load(x_ptr + at)"),
    "a mean of the block": ("tl.sum(x * x) / WIDTH", "tl.sum(x * x) / BLOCK"),
    "another eps": ("/ WIDTH + EPS", "/ WIDTH + 100 * EPS"),
    "the norm of what is not kept": ("x = total.to(tl.float32)", f"x += {LOADED}"),
    "no residual": ("dx += residual.to(tl.float32)", "dx = dx"),
    "a derivative without rstd": ("(rstd * rstd)", "rstd"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS.keys())
def test_what_is_wrong_on_purpose_is_seen(raced: Any, tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(mutant(norm, tmp_path, *change), raced, torch.bfloat16, 3, 72, adds=True)
