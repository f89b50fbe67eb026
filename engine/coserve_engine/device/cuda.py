"""Copies of a CUDA device through pinned memory. torch's allocator of pinned memory is the ring: it gives a block out
again when the copies that it took part in are over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve_engine.device.protocol import Columns, Rows, Staged


@dataclass(frozen=True, slots=True)
class Fetched:
    """A copy into pinned memory [N], which is over when `event` is."""

    host: torch.Tensor
    event: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def get(self) -> list[float]:
        self.event.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """`Device` whose copies are of the current stream, as all that is computed."""

    device: torch.device

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def stage_columns(self, columns: Columns) -> Staged:
        count = len(columns.all_ints)
        host = torch.empty(count + len(columns.all_floats), dtype=torch.int64, pin_memory=True)
        host[:count] = torch.tensor(columns.all_ints, dtype=torch.int64)
        host[count:].view(torch.float64).copy_(torch.tensor(columns.all_floats, dtype=torch.float64))
        staged = host.to(self.device, non_blocking=True)
        return Staged(staged[:count], staged[count:].view(torch.float64))

    def fetch(self, values: torch.Tensor) -> Fetched:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return Fetched(host, event)
