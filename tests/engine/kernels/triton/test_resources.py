"""What each kernel takes of a GPU at the shapes of Llama-3.1-8B in bfloat16, compiled without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import BLACKWELL, compile_for, launches

from coserve_engine.kernels.triton import gate
from coserve_engine.kernels.triton.keep import keep

ROWS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, SIZE = 512, 4096, 14336, 32, 8, 128


def rows(width: int) -> torch.Tensor:
    return torch.empty(ROWS, width, dtype=torch.bfloat16, device="cuda")


def gates() -> None:
    a, b = rows(2 * INTERMEDIATE).split(INTERMEDIATE, 1)
    gate.forward(a, b)
    gate.backward(rows(INTERMEDIATE), a, b)


def keeps() -> None:
    q, k, _ = rows((HEADS + 2 * KV_HEADS) * SIZE).split((HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE), 1)
    a, b = rows(2 * INTERMEDIATE).split(INTERMEDIATE, 1)
    lse = torch.empty(ROWS, HEADS, dtype=torch.float32, device="cuda")
    values = {"x": rows(HIDDEN), "q": q, "k": k, "o": rows(HIDDEN), "lse": lse, "x2": rows(HIDDEN), "gate": a, "up": b}
    keep(3, values, torch.empty(2, 4, dtype=torch.int64, device="cuda"))


@pytest.mark.parametrize("arch", [80, 90, BLACKWELL])
@pytest.mark.parametrize("words", [gates, keeps], ids=lambda words: words.__name__)
def test_elementwise_kernels_take_little(words: Callable[[], None], arch: int) -> None:
    found = launches(words)
    assert found
    for launched in found:
        usage = compile_for(arch, launched)
        assert usage.spills == 0
        assert usage.atomics == 0
        assert usage.narrow_loads == 0
        assert usage.wide_loads > 0
        assert usage.blocks * launched.kernel.warps >= 32
