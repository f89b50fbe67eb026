"""What attention's kernels take of a GPU at the shapes of Llama-3.1-8B in bfloat16, and at other head sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from compiled import Usage, compile_for, launches

from coserve_engine.kernels.triton import attention, attention_backward
from coserve_engine.kernels.triton.attention_backward import UnitTiles
from coserve_engine.kernels.triton.attention_parts import Heads
from coserve_engine.kernels.triton.attention_tables import CallTables, PassTables

HEADS, KV_HEADS, TILE, ROWS, PLACES = 32, 8, 64, 512, 64000


ARCHES = (80, 90, 100)
SIZES = ((128, None), (128, 4096), (64, None), (80, None), (96, None), (256, None))
"""Of heads, with windows."""
DAILY = {(128, None), (128, 4096), (96, None), (256, None)}


def shapes(sizes: Iterable[tuple[int, int | None]]) -> Any:
    """Parameters size, window and arch; what is seldom is compiled nightly."""
    return pytest.mark.parametrize(
        ("size", "window", "arch"),
        [
            pytest.param(
                *size, arch, marks=() if (size in DAILY and arch < 100) or size == (128, None) else pytest.mark.nightly
            )
            for size, arch in itertools.product(sizes, ARCHES)
        ],
    )


TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""Of an architecture's widest products."""
FEW_SPILLS = 16


def heads(size: int, arch: int, window: int | None = None) -> Heads:
    return Heads(HEADS, KV_HEADS, size, TILE, TILE, window, arch >= 90)


def rows(of: Heads, count: int = ROWS) -> torch.Tensor:
    return torch.empty(count, HEADS, of.size, dtype=torch.bfloat16, device="cuda")


def pools(of: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.empty(KV_HEADS, PLACES, of.size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return k, v


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cuda")


def sums() -> torch.Tensor:
    return torch.empty(ROWS, HEADS, dtype=torch.float32, device="cuda")


def forward(of: Heads) -> None:
    attention.forward(rows(of), *pools(of), CallTables(ints(8, 5), ints(8)), rows(of), sums(), of)


def decode(of: Heads) -> None:
    attention.decode(rows(of), *pools(of), ints(ROWS), ints(64, 64), rows(of), of)


def backward(of: Heads) -> None:
    dkv = torch.empty(2, KV_HEADS, ROWS, of.size, dtype=torch.float32, device="cuda")
    tables, unit = PassTables(ints(8, 6), ints(8)), UnitTiles(4, 8, 4)
    attention_backward.backward(rows(of, 256), rows(of, 256), rows(of), sums(), dkv, *pools(of), tables, unit, of)


def usages(words: Callable[[Heads], None], of: Heads, arch: int, spills: int = 0) -> dict[str, Usage]:
    """By name; of all that holds for each, with at most so many spills."""
    found = {launched.name: compile_for(arch, launched) for launched in launches(lambda: words(of))}
    for usage in found.values():
        assert usage.spills <= spills
        assert usage.atomics == 0
        assert usage.narrow_loads == 0
        assert usage.wide_loads > 0
        assert usage.blocks > 0
    return found


def buffers(usage: Usage) -> int:
    """How many of keys, and of values, are loaded ahead."""
    counts = sorted(int(size.split("x")[0]) for size in usage.pipeline if size.count("x") == 3)
    assert len(counts) == 2
    return counts[0]


@shapes(SIZES)
def test_forward(size: int, window: int | None, arch: int) -> None:
    usage = usages(forward, heads(size, arch, window), arch)["attention._forward"]
    assert usage.tensor_cores[TENSOR_CORES[arch]] > 0
    assert arch == 100 or buffers(usage) >= 3


@shapes([size for size in SIZES if size[1] is None])
def test_decode(size: int, window: int | None, arch: int) -> None:
    found = usages(decode, heads(size, arch, window), arch)
    usage, combine = found["attention._decode"], found["attention._combine"]
    assert usage.tensor_cores["HMMA"] > 0
    assert buffers(usage) >= 3
    assert combine.blocks >= 8
    if size == 128 and arch < 100:
        assert usage.blocks >= (4 if arch == 90 else 3)


@shapes(SIZES)
def test_backward(size: int, window: int | None, arch: int) -> None:
    """On an sm_100 a program of eight warps with tensor memory has 128 registers a thread, and stores a few."""
    found = usages(backward, heads(size, arch, window), arch, FEW_SPILLS if arch == 100 else 0)
    assert set(found) == {"attention_backward._queries", "attention_backward._keys"}
    cores = TENSOR_CORES[arch] if size <= 128 else "HMMA"
    assert all(usage.tensor_cores[cores] > 0 for usage in found.values())


def test_a_table_elsewhere_compiles_nothing_new() -> None:
    """Rows of staged columns begin anywhere: launches are not compiled for where."""
    for kernel in (attention._forward, attention._decode, attention._combine):
        tables = {"calls_ptr", "pages_ptr", "positions_ptr"} & set(kernel.arg_names)
        assert tables == {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    for kernel in (attention_backward._queries, attention_backward._keys):
        assert {p.name for p in kernel.params if p.do_not_specialize_on_alignment} == {"tiles_ptr", "pages_ptr"}
