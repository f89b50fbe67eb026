"""What products of one configuration take of a GPU at the shapes of Llama-3.1-8B, compiled without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Usage, compile_for, launches

from coserve_engine.kernels.triton.gemm import CONFIGURATIONS, product

ROWS, HIDDEN, INTERMEDIATE, VOCAB, QKV = 512, 4096, 14336, 128256, 6144


def rows(width: int, dtype: torch.dtype, count: int = ROWS) -> torch.Tensor:
    return torch.empty(count, width, dtype=dtype, device="cuda")


def weight(out: int, into: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(out, into, dtype=dtype, device="cuda")


def hidden(dtype: torch.dtype, arch: int) -> None:
    """Of queries, keys and values with a bias, and down, whose sum is the longest; both ways."""
    bias = torch.empty(QKV, dtype=dtype, device="cuda")
    hopper = arch >= 90
    product(rows(HIDDEN, dtype), weight(QKV, HIDDEN, dtype), bias, hopper=hopper)
    product(rows(INTERMEDIATE, dtype), weight(HIDDEN, INTERMEDIATE, dtype), hopper=hopper)
    product(rows(2 * INTERMEDIATE, dtype), weight(2 * INTERMEDIATE, HIDDEN, dtype), hopper=hopper, back=True)


def head(dtype: torch.dtype, arch: int) -> None:
    hopper = arch >= 90
    product(rows(HIDDEN, dtype), weight(VOCAB, HIDDEN, dtype), hopper=hopper, dtype=torch.float32)
    product(rows(VOCAB, dtype), weight(VOCAB, HIDDEN, dtype), hopper=hopper, back=True)


def used(words: Callable[[torch.dtype, int], None], dtype: torch.dtype, arch: int) -> list[Usage]:
    """Of each launch; what holds of all is asserted."""
    found = [compile_for(arch, launched) for launched in launches(lambda: words(dtype, arch))]
    for usage in found:
        print(arch, usage)
        assert usage.spills == 0
        assert usage.atomics == 0
        assert usage.narrow_loads == 0
        assert usage.wide_loads > 0
    return found


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("words", [hidden, head], ids=lambda words: words.__name__)
def test_products_fill_the_tensor_cores(words: Callable[[torch.dtype, int], None], arch: int) -> None:
    """Both operands are loaded three blocks ahead; on sm_90 warp groups multiply, two programs a multiprocessor."""
    found = used(words, torch.bfloat16, arch)
    assert len(found) == (3 if words is hidden else 2)
    for usage in found:
        assert usage.tensor_cores["HGMMA" if arch == 90 else "HMMA"] > 0
        ahead = [size for size in usage.pipeline if size.count("x") == 3]
        assert len(ahead) == 2
        assert all(int(size.split("x")[0]) >= 3 for size in ahead)
        assert usage.blocks >= (2 if arch == 90 else 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_products_in_float32(arch: int) -> None:
    """Never by tensor cores, which would round what is multiplied."""
    for usage in used(hidden, torch.float32, arch):
        assert not usage.tensor_cores
        assert usage.blocks >= 2


def test_a_kernel_serves_any_number_of_rows() -> None:
    def some() -> None:
        for count in (1, 16, 300, 70000):
            product(rows(HIDDEN, torch.bfloat16, count), weight(QKV, HIDDEN, torch.bfloat16), hopper=True)

    assert len(launches(some)) == 1


def test_sizes_do_not_depend_on_the_weight() -> None:
    """Or slices of one would be computed in another way than the whole."""

    def several() -> None:
        for out, into in ((QKV, HIDDEN), (HIDDEN, HIDDEN), (1024, HIDDEN), (VOCAB, 2048), (16, 16)):
            product(rows(into, torch.bfloat16), weight(out, into, torch.bfloat16), hopper=True)

    sizes = CONFIGURATIONS[torch.bfloat16, True].sizes
    found = [dict(launched.constants) for launched in launches(several)]
    assert len(found) == 5
    assert all({name: constants[name] for name in sizes} == sizes for constants in found)
