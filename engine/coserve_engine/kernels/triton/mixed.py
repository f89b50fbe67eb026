"""Batches of decode rows beside prompts and windows that stay where they are, for forwards that were captured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from coserve_engine.device.protocol import Device
from coserve_engine.kernels.bound import BoundBatch
from coserve_engine.kernels.graphs import SEQUENCES, PagedGraphs
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.triton.attention_tables import CallTables
from coserve_engine.kernels.triton.bound import triton_batch
from coserve_engine.kernels.triton.graphs import FEW as FEW_ADAPTERS
from coserve_engine.kernels.triton.graphs import AdaptedGraphs
from coserve_engine.kernels.triton.launch import cover
from coserve_engine.kernels.triton.lora_tables import FEW, MANY, LoraTables
from coserve_engine.tensors.lora import padded

CALLS, MORE_CALLS = 4, 4
"""Attention calls for each tile of other rows, and beside: a short prompt is one of its own."""
WINDOWS = 8
"""That keep."""


@dataclass(frozen=True, slots=True)
class MixedGraphs(AdaptedGraphs):
    """`Mixed`: rows of decode come first, then all others, and what is left is nobody's."""

    def forms(self, size: Fixed) -> tuple[Fixed, ...]:
        """Without adapters, and with few, whose rows stand together in small blocks or in large ones."""
        few = min(size.adapters, FEW_ADAPTERS)
        return size._replace(adapters=0), *(size._replace(adapters=few, block=block) for block in (FEW, MANY))

    def fixed(self, size: Fixed, device: Device) -> BoundBatch:
        """Rows that are nobody's have no call, and windows that are nobody's keep no row."""
        batch = triton_batch(PagedGraphs.fixed(self, size, device))
        calls = MORE_CALLS + CALLS * cover(size.others, self.numerics.tile)
        shapes = ((size.rows - size.others,), (calls, 5), (SEQUENCES * size.pages,), (WINDOWS, 4))
        decode_at, ragged, pages, keeping = [batch.table.new_zeros(shape) for shape in shapes]
        return replace(
            batch,
            layout=replace(batch.layout, calls=batch.layout.singles),  # there are such: they are launched
            decode_at=decode_at,
            ragged=CallTables(ragged, pages),
            keeping=keeping,
            lora=self._nobodys(size, device) if size.adapters else None,
        )

    def _nobodys(self, size: Fixed, device: Device) -> LoraTables:
        """Of which any may drop inputs."""
        room = (size.adapters, size.rows, padded(size.rank))
        return LoraTables.nobodys(self.tables(device), *room, block_rows=size.block, drops=True)

    def holds(self, into: BoundBatch, b: BoundBatch) -> bool:
        """Adapters only where it has room for adapters, and none where it has: that launches nothing of theirs."""
        mine, other = triton_batch(into), triton_batch(b)
        pairs = [(mine.ragged.calls, other.ragged.calls), (mine.ragged.pages, other.ragged.pages)]
        pairs += [(mine.keeping, other.keeping), (mine.table, other.table), (mine.table.t(), other.table.t())]
        if other.lora is not None and mine.lora is not None:
            if other.lora.block_rows != mine.lora.block_rows or other.lora.rank > mine.lora.rank:
                return False
            pairs += zip(mine.lora.parts, other.lora.parts, strict=True)
        return (mine.lora is None) == (other.lora is None) and all(len(b) <= len(a) for a, b in pairs)

    def fill(self, into: BoundBatch, b: BoundBatch) -> None:
        """Zeros are null pages, calls and windows without rows, and decode rows at their sequence's start."""
        mine, other = triton_batch(into), triton_batch(b)
        count, width = other.table.shape
        whole, theirs = [mine.tokens, mine.positions, mine.write], [other.tokens, other.positions, other.write]
        parts = [mine.decode_at, *mine.ragged, mine.keeping]
        others = [other.decode_at[:count], *other.ragged, other.keeping]
        torch._foreach_zero_([mine.table, *parts])
        mine.table[:count, :width].copy_(other.table)
        torch._foreach_copy_(whole + [a[: len(b)] for a, b in zip(parts, others, strict=True)], theirs + others)
        if mine.lora is not None:
            mine.lora.fill(other.lora)
