"""A kernel is prepared once for each kind of launch; numbers that change ask for none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton import launch, lora
from coserve_engine.kernels.triton.launch import Constants, Kernel

X, Y = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)


@triton.jit
def _twisted(count, y_ptr, WIDTH: tl.constexpr):
    tl.store(y_ptr, count)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["y_ptr"])
def _kernel(x_ptr, y_ptr, count, WIDTH: tl.constexpr, FAST: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) * count)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was handed over to a driver that is not there."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "prepared", lambda *arguments: lambda *handed: seen.append(handed))
    return seen


def test_a_launch_hands_over_addresses_in_the_functions_order(calls: list[tuple[Any, ...]]) -> None:
    kernel = Kernel(_kernel)
    kernel.launch((3, 2), Constants(WIDTH=16, FAST=True), X, Y, 7)
    assert calls == [(3, 2, 1, X.data_ptr(), Y.data_ptr(), 7, 16, True)]
    kernel.launch((0, 2), Constants(WIDTH=16, FAST=True), X, Y, 7)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "constants", "new"),
    [
        ((X, Y, 8), {}, False),
        ((X[8:], Y, 7), {}, False),
        ((X, Y[1:], 7), {}, False),
        ((X[1:], Y, 7), {}, True),
        ((X.float(), Y, 7), {}, True),
        ((X, Y, 7), {"WIDTH": 32}, True),
        ((X, Y, 7), {"FAST": False}, True),
    ],
    ids=["number", "even", "anywhere", "odd", "dtype", "width", "flag"],
)
def test_what_asks_for_another_kernel(
    calls: list[tuple[Any, ...]], arguments: tuple[Any, ...], constants: dict[str, Any], new: bool
) -> None:
    kernel, fixed = Kernel(_kernel), {"WIDTH": 16, "FAST": True}
    before = launch.compiled()
    kernel.launch((1,), Constants(**fixed), X, Y, 7)
    kernel.launch((1,), Constants(**{**fixed, **constants}), *arguments)
    assert launch.compiled() - before == 1 + new
    assert len(calls) == 2


def test_odd_addresses_are_told_apart(calls: list[tuple[Any, ...]]) -> None:
    """Which argument it is decides, and not where in its 16 bytes it begins."""
    kernel, one = Kernel(lora._expand), Constants(UNIT=False)
    kinds: list[int] = []
    for odd in ((), (0,), (1,), (0, 1), (0,)):
        tensors = [X[n in odd :] for n in range(5)]
        kernel.launch((1,), one, *tensors, 1, 2, 3, 4)
        kinds.append(len(kernel.ready))
    assert kinds == [1, 2, 3, 4, 4]
    kernel.launch((1,), one, X[3:], *[X] * 4, 1, 2, 3, 4)
    assert len(kernel.ready) == 4


def test_constants_are_the_same_by_name_and_value() -> None:
    assert Constants(A=1, B=2) == Constants(A=1, B=2)
    assert hash(Constants(A=1, B=2)) == hash(Constants(A=1, B=2))
    assert len({Constants(A=1, B=2), Constants(A=2, B=1), Constants(A=1), Constants(C=1)}) == 4


def test_pointers_behind_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"_twisted.*pointers must come before numbers"):
        Kernel(_twisted)
