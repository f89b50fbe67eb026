"""What the kernels that go row by row take of a GPU at the shapes of Llama-3.1-8B in bfloat16, compiled without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled import Usage, compile_for, launches

from coserve_engine.kernels.triton import encode, loss, norm

ROWS, HIDDEN, HEADS, KV_HEADS, VOCAB, POSITIONS, PAGES, PAGE = 512, 4096, 32, 8, 128256, 8192, 1000, 64
EPS = 1e-5


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


wide, ints = partial(cuda, dtype=torch.float32), partial(cuda, dtype=torch.int64)


def norms(hidden: int) -> None:
    x, weight = cuda(ROWS, hidden), cuda(hidden)
    for residual in (None, cuda(ROWS, hidden)):
        _, dy, rstd = norm.forward(x, weight, EPS, residual)
        norm.backward(dy, x, rstd, weight, residual)
        norm.backward(wide(ROWS, hidden), x, rstd, weight, residual)


def heads(size: int, normed: tuple[bool, ...]) -> None:
    q, k, v = cuda(ROWS, HEADS + 2 * KV_HEADS, size).split([HEADS, KV_HEADS, KV_HEADS], 1)
    k_pool, v_pool = cuda(2, KV_HEADS, PAGES * PAGE, size)
    dkv = wide(2, KV_HEADS, 4 * ROWS, size)[:, :, ROWS : 2 * ROWS]
    rope, positions, write = wide(2, POSITIONS, size), ints(ROWS), ints(ROWS)
    for has_norm in normed:
        weight = cuda(size) if has_norm else None
        encode.forward(q, k, v, weight, weight, EPS, rope, positions, write, k_pool, v_pool)
        encode.queries(q, weight, EPS, rope, positions)
        encode.backward(wide(ROWS, HEADS, size), dkv, q, k, weight, weight, EPS, rope, positions)


def losses(vocab: int) -> None:
    logits, targets = wide(ROWS, vocab), ints(ROWS)
    loss.log_softmax(logits)
    logp, lse, _ = loss.score(logits, targets)
    for out in (logits, cuda(ROWS, vocab)):
        loss.backward(logits, targets, lse, logp, out)


def nightly(size: int, arch: int) -> Any:
    return pytest.param(size, arch, marks=pytest.mark.nightly)


ELSEWHERE = (96, 256, 96, 128, 256), (80, 80, 100, 100, 100)


def used(words: Callable[[], None], arch: int) -> list[tuple[str, int, Usage]]:
    """Of each launch: name, warps, and what it takes; what holds of all is asserted."""
    found = [(launched.name, launched.kernel.warps, compile_for(arch, launched)) for launched in launches(words)]
    for name, _, usage in found:
        assert usage.spills == 0, name
        assert usage.atomics == 0, name
        assert usage.narrow_loads == 0, name
        assert usage.wide_loads > 0, name
    return found


@pytest.mark.parametrize(("hidden", "arch"), [(HIDDEN, 80), (HIDDEN, 90), (5120, 90), nightly(HIDDEN, 100)])
def test_norms(hidden: int, arch: int) -> None:
    found = used(partial(norms, hidden), arch)
    assert [name for name, _, _ in found] == ["norm._forward", "norm._backward", "norm._backward"] * 2
    for name, warps, usage in found:
        assert usage.blocks * warps >= (32 if arch < 100 else 1), name


@pytest.mark.parametrize(
    ("size", "arch"), [(128, 80), (64, 90), (96, 90), (128, 90), (256, 90), *map(nightly, *ELSEWHERE)]
)
def test_heads(size: int, arch: int) -> None:
    normed = (False, True) if size == 128 else (True,)
    found = used(partial(heads, size, normed), arch)
    assert [name for name, _, _ in found] == ["encode._forward", "encode._queries", "encode._backward"] * len(normed)
    for name, warps, usage in found:
        assert usage.blocks * warps >= (36 if arch < 100 else 1), name
        assert usage.shared <= 512, name


@pytest.mark.parametrize(("vocab", "arch"), [(VOCAB, 80), (VOCAB, 90), (151936, 90), nightly(VOCAB, 100)])
def test_losses(vocab: int, arch: int) -> None:
    found = used(partial(losses, vocab), arch)
    assert [name for name, _, _ in found] == ["loss._log_softmax", "loss._score", "loss._backward", "loss._backward"]
    for name, warps, usage in found:
        assert usage.blocks * warps >= (40 if arch < 100 else 1), name
    for name, _, usage in found[:2]:
        assert usage.pipeline == ("3x2048xf32",), name


def test_a_pass_of_any_size_finds_its_kernel() -> None:
    """The rows of a pass lie in a tensor of another stride each: nothing is compiled for that."""

    def units() -> None:
        q, rope = cuda(ROWS, HEADS, 64), wide(2, POSITIONS, 64)
        for rows in (ROWS, 3 * ROWS, 1000 * ROWS):
            dkv = wide(2, KV_HEADS, rows, 64)[:, :, :ROWS]
            encode.backward(wide(ROWS, HEADS, 64), dkv, q, None, None, None, EPS, rope, ints(ROWS))

    assert len(launches(units)) == 1
