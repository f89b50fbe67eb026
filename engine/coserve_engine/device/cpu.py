"""A CPU computes at once: whatever is fetched is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve_engine.device.protocol import Columns, Rows, Staged


@dataclass(frozen=True, slots=True)
class Here:
    """Numbers that the host has."""

    numbers: list[float]

    def ready(self) -> bool:
        return True

    def get(self) -> list[float]:
        return self.numbers


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """`Device` without one."""

    device: torch.device

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    def stage_columns(self, columns: Columns) -> Staged:
        ints = torch.tensor(columns.all_ints, dtype=torch.int64)
        return Staged(ints, torch.tensor(columns.all_floats, dtype=torch.float64))

    def fetch(self, values: torch.Tensor) -> Here:
        return Here(values.tolist())
