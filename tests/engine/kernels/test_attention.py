"""The CPU's attention kernel computes the definition, and one row gives the same bits however it is called."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from coserve_engine.config import ModelConfig, Rope
from coserve_engine.device.cpu import CpuDevice
from coserve_engine.device.protocol import Columns
from coserve_engine.kernels.attention import (
    Attention,
    Mask,
    cpu_backward,
    cpu_forward,
    reference_backward,
    reference_forward,
)
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import KVCache, PageRun

CPU = torch.device("cpu")
NUMERICS = Numerics()
HEADS, SIZE = 6, 32
LENGTHS = (64, 320, 640)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask_of(kv_heads: int, window: int | None = None, dtype: torch.dtype = torch.float32) -> Mask:
    return Mask.create(NUMERICS, HEADS // kv_heads, 1024, window, dtype, CPU)


@pytest.mark.parametrize("kv_heads", (1, 2, 6))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", (None, 20, 300))
def test_the_kernel_is_the_definition(kv_heads: int, length: int, window: int | None) -> None:
    dtype = torch.float64
    mask = mask_of(kv_heads, window, dtype)
    length -= mask.first_key(length)
    rows = 64 * HEADS // kv_heads
    q, do = draw(1, kv_heads, rows, SIZE, dtype=dtype), draw(1, kv_heads, rows, SIZE, dtype=dtype, seed=1)
    k, v = draw(1, kv_heads, length, SIZE, dtype=dtype, seed=2), draw(1, kv_heads, length, SIZE, dtype=dtype, seed=3)
    part = mask.part(0, rows, length)
    found, expected = cpu_forward(q, k, v, part), reference_forward(q, k, v, part)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, expected, strict=True))
    for a, b in zip(
        cpu_backward(do, q, k, v, *found, part), reference_backward(do, q, k, v, *expected, part), strict=True
    ):
        assert (a - b).abs().max() < 1e-11


def differing(kv_heads: int, length: int, runs: Sequence[tuple[int, int]], window: int | None = None) -> int:
    """Rows of a tile whose bits differ between a call of the whole tile and calls of these (first, count)."""
    attention, mask = Attention.select(NUMERICS, CPU), mask_of(kv_heads, window)
    q, k, v = draw(64, HEADS, SIZE), draw(kv_heads, length, SIZE, seed=1), draw(kv_heads, length, SIZE, seed=2)
    whole, _ = attention.attend(q, k, v, mask, 0)
    bad = 0
    for first, count in runs:
        part, _ = attention.attend(q[first : first + count], k, v, mask, first)
        bad += int((part != whole[first : first + count]).any(-1).any(-1).sum())
    singles = attention.attend_singles(q, [(k[None], v[None])] * 64, mask, tuple(range(64)))
    return bad + int((singles != whole).any(-1).any(-1).sum())


@pytest.mark.parametrize("kv_heads", (1, 2, 6))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", (None, 100))
def test_a_rows_bits_do_not_depend_on_its_call(kv_heads: int, length: int, window: int | None) -> None:
    length = min(length, 192) if window else length
    runs = [(first, count) for first in range(0, 64, 5) for count in (1, 2, 3, 4, 7, 16, 33) if first + count <= 64]
    assert differing(kv_heads, length, runs, window) == 0


def test_rows_that_are_not_padded_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numerics, "pad", lambda _, rows: rows)
    assert differing(6, 320, [(first, 1) for first in range(64)]) > 0


def run_of(*pages: int) -> PageRun:
    columns = Columns()
    columns.ints((7, 7))
    (run,) = PageRun.put([pages], columns)(CpuDevice(CPU).stage_columns(columns))
    return run


def test_neighbouring_pages_are_read_in_place() -> None:
    config = ModelConfig(16, 8, 1, 2, 2, 4, 8, 1e-5, Rope(1e4), 1024, (), False, (None,), False, ())
    cache = KVCache(config, 8, NUMERICS, torch.float32, CPU)
    cache.k.copy_(draw(*cache.k.shape))
    run, gathered = run_of(2, 3, 4), run_of(2, 4, 3)
    assert run.index is None and gathered.index is not None
    k, _ = cache.read(0, run, 64, 192)
    assert k.data_ptr() == cache.k[0, :, 3 * 64].data_ptr()
    other, _ = cache.read(0, PageRun(2, torch.tensor([2, 3, 4])), 64, 192)
    assert torch.equal(k, other)
    swapped, _ = cache.read(0, gathered, 64, 192)
    assert torch.equal(swapped, torch.cat([k[:, 64:], k[:, :64]], 1))


@pytest.mark.parametrize("pages", ((2, 3, 4), (2, 4, 3)))
def test_a_reader_reads_every_layer(pages: tuple[int, ...]) -> None:
    config = ModelConfig(16, 8, 3, 2, 2, 4, 8, 1e-5, Rope(1e4), 1024, (), False, (None,), False, ())
    cache = KVCache(config, 8, NUMERICS, torch.float32, CPU)
    cache.k.copy_(draw(*cache.k.shape))
    cache.v.copy_(draw(*cache.v.shape, seed=1))
    run = run_of(*pages)
    read = cache.reader(run, 64, 192)
    for layer in range(3):
        for found, expected in zip(read(layer), cache.read(layer, run, 64, 192), strict=True):
            assert torch.equal(found, expected[None])
