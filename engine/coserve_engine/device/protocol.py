"""What the host asks of a device beside computing: to take numbers over, and to hand some back without a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Rows = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.int32]
"""Numbers [N] or [rows, N]; ints where the dtype is one of ints."""


class Columns:
    """Numbers of the host, gathered so that one copy takes all of them to the device."""

    def __init__(self) -> None:
        self.all_ints: list[int] = []
        self.all_floats: list[float] = []

    def ints(self, values: Iterable[int]) -> slice:
        """Add some; where they will be among the `Staged.ints`."""
        start = len(self.all_ints)
        self.all_ints.extend(values)
        return slice(start, len(self.all_ints))

    def floats(self, values: Iterable[float]) -> slice:
        """Add some; where they will be among the `Staged.floats`."""
        start = len(self.all_floats)
        self.all_floats.extend(values)
        return slice(start, len(self.all_floats))


class Staged(NamedTuple):
    """Columns on the device: int64 [n] and float64 [m]."""

    ints: torch.Tensor
    floats: torch.Tensor


class Pending(Protocol):
    """Numbers on their way to the host."""

    def ready(self) -> bool:
        """Whether `get` would not wait."""

    def get(self) -> list[float]:
        """The numbers; waits for what was enqueued before the fetch."""


class Mark(Protocol):
    """A point in the order of what is computed."""

    def over(self) -> bool:
        """Whether the device has come there."""

    def at_s(self) -> float:
        """When it did, in seconds of the host's clock; to be asked in the order of the marks, once each is over."""


class Graph(Protocol):
    """What was computed once, to be computed again: on what lies at the same addresses then, into the same."""

    def replay(self) -> None:
        """Enqueue all of it at once."""


Beside = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Of what computes something: who waits for it, and says what it returned."""


def in_turn(run: Callable[[], Any]) -> Callable[[], Any]:
    """Beside nothing: before all that is enqueued next."""
    made = run()
    return lambda: made


class Device(Protocol):
    """All words are in the order of what is computed."""

    @property
    def device(self) -> torch.device: ...

    @property
    def behind(self) -> bool:
        """Whether it computes behind the host, which only enqueues."""

    def reserve(self, size: int) -> None:
        """So many bytes will be needed in each iteration: take them from the system once, where it would be asked again
        and again.
        """

    def mark(self) -> Mark:
        """The point up to which all is enqueued now."""

    def rest(self) -> None:
        """Nothing is under way. To be called now and then meanwhile: a clock that maps marks can be set."""

    def wait(self, mark: Mark | None, seconds: float) -> None:
        """So long, or until a mark is over."""

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        """Numbers of the host as a tensor of the device."""

    def stage_columns(self, columns: Columns) -> Staged:
        """All columns by one copy."""

    def fetch(self, values: torch.Tensor) -> Pending:
        """Begin to fetch values [N] as they are now; they may be overwritten at once."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """What `run` computes, which it does not have done when this returns; nothing else may be under way. Its memory
        is the graph's: of several, each is to be replayed alone.
        """

    def beside(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Have it computed beside what is enqueued before its end is waited for, which must touch none of it."""

    def carry(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the host on the device, and `bring`: the reverse of what was enqueued before. For a thread beside
        that which enqueues, as it waits; neither takes a turn of what is computed.
        """

    def bring(self, values: torch.Tensor) -> torch.Tensor: ...
