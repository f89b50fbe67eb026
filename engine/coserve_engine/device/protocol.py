"""What the host asks of a device beside computing: to take numbers over, and to hand some back without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Rows = Sequence[float] | Sequence[Sequence[float]]
"""Numbers [N] or [rows, N]; ints where the dtype is one of ints."""


class Pending(Protocol):
    """Numbers on their way to the host."""

    def ready(self) -> bool:
        """Whether `get` would not wait."""

    def get(self) -> list[float]:
        """The numbers; waits for what was enqueued before the fetch."""


class Device(Protocol):
    """Both words are in the order of what is computed."""

    @property
    def device(self) -> torch.device: ...

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        """Numbers of the host as a tensor of the device."""

    def fetch(self, values: torch.Tensor) -> Pending:
        """Begin to fetch values [N] as they are now; they may be overwritten at once."""
