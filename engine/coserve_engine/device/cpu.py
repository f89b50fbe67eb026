"""A CPU computes at once: whatever is fetched is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.device.protocol import Columns, Graph, Mark, Rows, Staged, in_turn


@dataclass(frozen=True, slots=True)
class Here:
    """Numbers that the host has."""

    numbers: list[float]

    def ready(self) -> bool:
        return True

    def get(self) -> list[float]:
        return self.numbers


@dataclass(frozen=True, slots=True)
class Now:
    """A mark of what computes at once."""

    now_s: float

    def over(self) -> bool:
        return True

    def at_s(self) -> float:
        return self.now_s


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """`Device` without one."""

    device: torch.device
    behind: bool = False

    def reserve(self, size: int) -> None:
        """Nothing is asked of a system."""

    def mark(self) -> Now:
        return Now(time.monotonic())

    def rest(self) -> None:
        """Its clock is the host's."""

    def wait(self, mark: Mark | None, seconds: float) -> None:
        """It is over."""

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    def stage_columns(self, columns: Columns) -> Staged:
        ints = torch.tensor(columns.all_ints, dtype=torch.int64)
        return Staged(ints, torch.tensor(columns.all_floats, dtype=torch.float64))

    def fetch(self, values: torch.Tensor) -> Here:
        return Here(values.tolist())

    def capture(self, run: Callable[[], None]) -> Graph:
        raise NotImplementedError("a CPU computes at once")

    def beside(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return in_turn(run)

    def carry(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(values)

    def bring(self, values: torch.Tensor) -> torch.Tensor:
        return values
