"""Device and dtype choose the table, which is said in the log; a dtype that is none is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_engine.errors import EngineConfigError
from coserve_engine.kernels.cpu.table import CpuKernels
from coserve_engine.kernels.torch.table import TorchKernels


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
