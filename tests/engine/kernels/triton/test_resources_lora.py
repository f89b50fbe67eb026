"""What LoRA's kernels take of a GPU at the shapes of Llama-3.1-8B in bfloat16, compiled without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from compiled import compile_for, launches

from coserve_engine.kernels.protocol import DOWN, GATE_UP, QKV
from coserve_engine.kernels.triton import lora, lora_backward, lora_tables
from coserve_engine.kernels.triton.lora_tables import AdapterTable, LoraTables, PassTables

LAYERS, HIDDEN, INTERMEDIATE, ROWS = 32, 4096, 14336, 512
OUTS = {QKV: (4096, 1024, 1024), GATE_UP: (INTERMEDIATE, INTERMEDIATE), DOWN: (HIDDEN,)}
NAMES = frozenset((*QKV, *GATE_UP, *DOWN))


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cuda")


def rows(width: int) -> torch.Tensor:
    return torch.empty(ROWS, width, dtype=torch.bfloat16, device="cuda")


def tables(block_rows: int, *, drops: bool) -> LoraTables:
    slots, folds = ints(64, 4), torch.empty(LAYERS * 7, dtype=torch.int32, device="cuda")
    entries = ints(LAYERS * 7, 64, 4)
    lora_tables.gather(slots, entries)
    return LoraTables(entries, slots, folds, ints(64, 4), ints(64), 64, ROWS, 64, NAMES, block_rows, drops)


def both(of: LoraTables, group: tuple[str, ...], into: int) -> None:
    outs = OUTS[group]
    lora.expand(lora.shrink(rows(into), of, 1, group), rows(sum(outs)), of, 1, group, outs)


def decode() -> None:
    both(tables(lora_tables.FEW, drops=False), QKV, HIDDEN)
    both(tables(lora_tables.FEW, drops=False), DOWN, INTERMEDIATE)


def alike() -> None:
    """Decode where all rows are computed by one configuration."""
    both(tables(lora_tables.MANY, drops=False), QKV, HIDDEN)
    both(tables(lora_tables.MANY, drops=False), DOWN, INTERMEDIATE)


def windows() -> None:
    both(tables(lora_tables.MANY, drops=True), GATE_UP, HIDDEN)
    both(tables(lora_tables.FEW, drops=True), DOWN, INTERMEDIATE)


def backward() -> None:
    folds = torch.empty(LAYERS * 7, dtype=torch.int32, device="cuda")
    adapter = AdapterTable(ints(LAYERS * 7, 4), 16, NAMES)
    of = PassTables(adapter, ints(1, 4), folds, ints(8, 2), True)
    flat = torch.empty(16 * (3 * HIDDEN + 6144), device="cuda")
    a, b = flat[: 16 * HIDDEN].view(16, -1), flat[16 * HIDDEN :][: 16 * HIDDEN].view(-1, 16)
    grads, outs = dict.fromkeys(QKV, (a, b)), OUTS[QKV]
    x = rows(HIDDEN)
    lora_backward.lora_gradient(rows(sum(outs)), x, rows(HIDDEN), flat, grads, of, 1, QKV, outs, (0, 8), slice(0, ROWS))


BLOCKS = {"_gather": 16, "_shrink": 2, "_expand": 3, "_gradient": 2, "_into_dx": 2}
"""The least programs that a multiprocessor is to hold."""


@pytest.mark.parametrize(
    ("words", "arch"),
    [
        *itertools.product((decode, alike, windows, backward), (90,)),
        *(
            pytest.param(words, arch, marks=pytest.mark.nightly)
            for words, arch in itertools.product((decode, alike, windows, backward), (80, 100))
            if (words, arch) != (alike, 100)
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_lora_kernels_take_little(words: Callable[[], None], arch: int) -> None:
    found = launches(words)
    assert found
    assert arch < 100 or words is decode or any(compile_for(arch, one).tensor_cores["UTCHMMA"] for one in found)
    for launched in found:
        usage = compile_for(arch, launched)
        name = launched.kernel.function.__name__
        print(launched.name, arch, usage)
        assert usage.spills == 0
        assert usage.atomics == 0
        assert usage.narrow_loads == 0
        assert usage.blocks >= (BLOCKS[name] if arch < 100 else 1)
        if name != "_gather":
            assert usage.wide_loads > 0
            assert usage.tensor_cores
