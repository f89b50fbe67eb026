"""Batches of decode rows with adapters, for forwards that were captured: a batch without any meets none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coserve_engine.device.protocol import Device
from coserve_engine.kernels.bound import BoundBatch
from coserve_engine.kernels.graphs import PagedGraphs
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.triton.bound import triton_batch
from coserve_engine.kernels.triton.lora_tables import Adapters, LoraTables
from coserve_engine.tensors.lora import padded

FEW = 8
"""Adapters of a batch for which there is a forward of its own: one for as many as rows launches programs for each."""


@dataclass(frozen=True, slots=True)
class AdaptedGraphs(PagedGraphs[BoundBatch]):
    """`tables`: of the adapters of an engine on a device."""

    tables: Callable[[Device], Adapters]

    def adapters(self, rows: int) -> tuple[int, ...]:
        return (0, FEW, rows) if rows > FEW else (0, rows)

    def fixed(self, size: Fixed, device: Device) -> BoundBatch:
        batch = triton_batch(PagedGraphs.fixed(self, size, device))
        if not size.adapters:
            return batch
        nobodys = LoraTables.nobodys(self.tables(device), size.adapters, size.rows, padded(size.rank))
        return replace(batch, lora=nobodys)

    def fill(self, into: BoundBatch, b: BoundBatch) -> None:
        PagedGraphs.fill(self, into, b)
        lora = triton_batch(into).lora
        if lora is not None:
            lora.fill(triton_batch(b).lora)
