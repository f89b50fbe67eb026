"""Devices that take their time, at random, where there is none: whoever reads too early is found out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coserve_engine.device.cpu import CpuDevice, Now
from coserve_engine.device.protocol import Columns, Mark, Rows, Staged

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


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A graph without a device: what was computed is computed again on the same tensors, with the same numbers.

    `steps` are what is done again; who computes without torch's operators adds its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        made = func(*args, **given)
        if not func.is_view:
            self.steps.append(partial(_again, func, args, given, made))
        return made

    def replay(self) -> None:
        for step in self.steps:
            step()


def _again(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """Into the tensors that were made then."""
    for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and new is not old:
            old.copy_(new)


@dataclass(slots=True)
class _Stand:
    """What stands for a device does alike, unless it says otherwise: its copies and all else are over at once."""

    device: torch.device

    def reserve(self, size: int) -> None:
        """Nothing is asked of a system."""

    def mark(self) -> Mark:
        return Now(0.0)

    def wait(self, mark: Mark | None, seconds: float) -> None:
        """It is over."""

    def rest(self) -> None:
        """Its clock is the host's."""

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def stage_columns(self, columns: Columns) -> Staged:
        return Staged(*(part.to(self.device) for part in CpuDevice(self.device).stage_columns(columns)))

    def capture(self, run: Callable[[], None]) -> Recorded:
        graph = Recorded()
        with graph:
            run()
        return graph

    def beside(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """As late as may be."""
        return run

    def carry(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [value.to(self.device) for value in values]

    def bring(self, values: torch.Tensor) -> torch.Tensor:
        return values.cpu()


@dataclass(slots=True)
class FakeDevice(_Stand):
    """`Device` over a CPU's tensors. Counts the looks that came `early`, and the `waits`: numbers that were taken
    before they were there.
    """

    random: random.Random = field(default_factory=lambda: random.Random(0))
    early: int = 0
    waits: int = 0
    behind: bool = False

    def fetch(self, values: torch.Tensor) -> Delayed:
        return Delayed(self, values.tolist(), self.random.randint(1, MOST_LOOKS))


@dataclass(frozen=True, slots=True)
class Ones:
    """Numbers in the place of those that nothing computed: all is finite, and every token the same."""

    count: int

    def ready(self) -> bool:
        return True

    def get(self) -> list[float]:
        return [1.0] * self.count


@dataclass(slots=True)
class NoValues(_Stand):
    """`Device` over tensors without values."""

    behind: bool = True

    def fetch(self, values: torch.Tensor) -> Ones:
        return Ones(values.numel())


@dataclass(slots=True)
class At:
    """A mark that is over at a time of the owner's clock, and numbers that are there then."""

    owner: BehindDevice
    over_s: float
    numbers: list[float] = field(default_factory=list)

    def over(self) -> bool:
        return self.owner.clock() >= self.over_s

    def at_s(self) -> float:
        assert self.over()  # or nobody knows
        return self.over_s

    def ready(self) -> bool:
        return self.over()

    def get(self) -> list[float]:
        self.owner.waits += not self.over()
        return self.numbers


@dataclass(slots=True)
class BehindDevice(_Stand):
    """`Device` over a CPU's tensors that is through with what it was given at a time of its own: each fetch and mark
    comes up to `slow_s` after the one before. `waits` are numbers that were taken before they were there, `idle` how
    often it had nothing left to do.
    """

    clock: Callable[[], float]
    pass_time: Callable[[float], None]
    """Moves the clock."""
    random: random.Random
    slow_s: float = 2e-3
    waits: int = 0
    idle: int = 0
    reserved: int = 0
    behind: bool = True
    free_s: float = 0.0

    def _later(self) -> float:
        now = self.clock()
        self.idle += self.free_s < now
        self.free_s = max(self.free_s, now) + self.random.uniform(0.0, self.slow_s)
        return self.free_s

    def reserve(self, size: int) -> None:
        self.reserved = size

    def mark(self) -> At:
        return At(self, self._later())

    def wait(self, mark: Mark | None, seconds: float) -> None:
        self.pass_time(seconds)

    def fetch(self, values: torch.Tensor) -> At:
        return At(self, self._later(), values.tolist())
