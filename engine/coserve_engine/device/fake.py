"""A device whose copies take their time, at random, where there is none: whoever reads one too early is found out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from coserve_engine.device.protocol import Columns, Rows, Staged

MOST_LOOKS = 6


@dataclass(slots=True)
class Delayed:
    """Numbers that are there after so many looks."""

    owner: FakeDevice
    numbers: list[float]
    looks: int

    def ready(self) -> bool:
        self.looks = max(0, self.looks - 1)
        self.owner.early += self.looks > 0
        return self.looks == 0

    def get(self) -> list[float]:
        self.owner.waits += self.looks > 0
        self.looks = 0
        return self.numbers


@dataclass(slots=True)
class FakeDevice:
    """`Device` over a CPU's tensors. Counts the looks that came `early`, and the `waits`: numbers that were taken
    before they were there.
    """

    device: torch.device
    random: random.Random = field(default_factory=lambda: random.Random(0))
    early: int = 0
    waits: int = 0

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def stage_columns(self, columns: Columns) -> Staged:
        ints = self.stage(columns.all_ints, torch.int64)
        return Staged(ints, self.stage(columns.all_floats, torch.float64))

    def fetch(self, values: torch.Tensor) -> Delayed:
        return Delayed(self, values.tolist(), self.random.randint(1, MOST_LOOKS))
