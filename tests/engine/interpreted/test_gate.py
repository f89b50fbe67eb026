"""silu(gate) * up and its derivative against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import close
from torch.nn import functional

from coserve_engine.kernels.triton import gate


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 1024), (5, 1040)])
def test_gate(raced: Any, dtype: torch.dtype, rows: int, width: int) -> None:
    both = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b = both.split(width, 1)
    dh = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    (h,) = raced(lambda: (gate.forward(a, b),))
    wide_a, wide_b = a.double().requires_grad_(), b.double().requires_grad_()
    expected = functional.silu(wide_a) * wide_b
    close(h, expected, dtype)
    dgate, dup = raced(lambda: gate.backward(dh, a, b))
    expected.backward(dh.double())
    close(dgate, wide_a.grad, dtype)
    close(dup, wide_b.grad, dtype)
