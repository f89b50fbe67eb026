"""Device and dtype choose the table, which is said in the log; a dtype that is none is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from coserve_engine.errors import EngineConfigError
from coserve_engine.kernels.cpu.table import CpuKernels
from coserve_engine.kernels.select import select
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.tensors.dtypes import Dtypes


@pytest.mark.parametrize(
    ("dtype", "table", "note"),
    [
        ("float32", CpuKernels, "kernels: cpu, float32"),
        ("float64", CpuKernels, "kernels: cpu, float64"),
        ("bfloat16", TorchKernels, "kernels: torch, bfloat16 on cpu"),
    ],
)
def test_device_and_dtype_choose(driver: Any, dtype: str, table: type, note: str) -> None:
    engine = driver(dtype=dtype).engine
    assert type(engine.executor.kernels) is table
    notes = engine.ready().notes
    assert note in notes
    assert any("depend on their batch" in line for line in notes) == (table is TorchKernels)


@pytest.mark.parametrize("dtype", ("float16", "", "bf16"))
def test_another_dtype_is_refused(driver: Any, dtype: str) -> None:
    with pytest.raises(EngineConfigError, match=f"dtype is '{dtype}'; it must be one of bfloat16, float32, float64"):
        driver(dtype=dtype)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_a_cpu_is_as_exact_in_either_mode(driver: Any, dtype: str) -> None:
    assert type(driver(dtype=dtype, numerics_mode="exact").engine.executor.kernels) is CpuKernels


def test_bfloat16_on_a_cpu_is_not_exact(driver: Any) -> None:
    with pytest.raises(EngineConfigError, match=r"numericsMode is Exact, .* bfloat16 on a CPU .*dtype to float32, or"):
        driver(dtype="bfloat16", numerics_mode="exact")


class OnCuda:
    """Of rope's table, what choosing asks."""

    device = torch.device("cuda")


def test_a_model_that_the_kernels_do_not_take_is_not_exact_on_a_gpu(driver: Any) -> None:
    e = driver().engine.executor
    odd, rope = replace(e.model, intermediate=168), cast("torch.Tensor", OnCuda())
    with pytest.raises(EngineConfigError, match=r"numericsMode is Exact, .* divide by 16, .*numericsMode to Fast"):
        select(odd, e.numerics, Dtypes.of("bfloat16"), rope, backward=True, exact=True, fallback=True)


def test_another_mode_is_refused(driver: Any) -> None:
    with pytest.raises(EngineConfigError, match="numerics_mode is 'Exact'; it must be one of fast, exact"):
        driver(numerics_mode="Exact")
