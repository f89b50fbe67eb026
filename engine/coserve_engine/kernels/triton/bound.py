"""A batch and a unit as the kernels read them: their tables, beside the rows that every table of kernels binds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from coserve_engine.device.protocol import Columns, Device
from coserve_engine.kernels.bound import BoundBatch, BoundUnit, Shared, put_rows, put_table
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.kernels.triton import attention_tables, lora_tables
from coserve_engine.kernels.triton.attention_backward import UnitTiles
from coserve_engine.kernels.triton.attention_tables import CallTables
from coserve_engine.kernels.triton.keep import KeptTables
from coserve_engine.kernels.triton.lora_tables import Adapters, LoraTables
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.tensors.passes import PassTensors, UnitRows


@dataclass(frozen=True, kw_only=True)
class TritonBatch(BoundBatch):
    """`decode_at`: positions of the decode rows, and maybe more; `ragged`: of the layout's calls; `lora`: of its rows
    with adapters, None where it has none; `keeping`: of windows that keep (`KeptTables.put`).
    """

    decode_at: torch.Tensor
    ragged: CallTables
    lora: LoraTables | None
    keeping: torch.Tensor


def triton_batch(b: BoundBatch) -> TritonBatch:
    """A batch as this table has bound it."""
    assert isinstance(b, TritonBatch)
    return b


class PassTables(NamedTuple):
    """What units of a pass read of it; `lora` is None where its adapter adapts nothing."""

    attention: attention_tables.PassTables
    lora: lora_tables.PassTables | None


@dataclass(frozen=True)
class TritonUnit(BoundUnit):
    """Tiles `at` of a pass."""

    at: UnitTiles
    tables: PassTables

    @property
    def adapted(self) -> LoraTables | None:
        """The tables of its rows' adapter."""
        lora = self.tables.lora
        return None if lora is None else lora.rows(self.rows.start, self.rows.stop)


@dataclass(slots=True)
class Tables:
    """Of adapters and passes, each made once and forgotten with what it is of.

    `alike`: whether rows of all kinds are computed by one configuration, decode rows as those of prompts.
    """

    layers: int
    alike: bool = False
    adapters: Adapters | None = None
    passes: WeakKeyDictionary[PassTensors, PassTables] = field(default_factory=WeakKeyDictionary)
    kept: KeptTables = field(default_factory=KeptTables)

    def bind(
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        shared: Shared,
    ) -> TritonBatch:
        """`Kernels.bind`."""
        adapters, columns = self.of_adapters(shared.device), Columns()
        rows = put_rows(layout, passes, shared, columns)
        table = put_table(layout.singles, columns)
        calls = attention_tables.put_calls(layout, shared.numerics, columns, singles=self.alike)
        lora = lora_tables.put(layout, sequences, passes, adapters, columns, alike=self.alike)
        keeping = self.kept.put(layout, passes, shared.device, columns)
        staged = shared.device.stage_columns(columns)
        bound = rows(staged)
        return TritonBatch(
            **vars(bound),
            table=table(staged),
            singles=(),
            calls=(),
            adapters=(),
            decode_at=bound.positions,
            ragged=calls(staged),
            lora=lora(staged),
            keeping=keeping(staged),
        )

    def of_adapters(self, device: Device) -> Adapters:
        """Those of the engine."""
        if self.adapters is None:
            self.adapters = Adapters.create(self.layers, device)
        return self.adapters

    def unit(self, state: PassTensors, layer: int, first: int, end: int, rope: torch.Tensor) -> TritonUnit:
        """`Kernels.bind_unit`, of a pass whose rows were computed."""
        tables = self.passes.get(state)
        if tables is None:
            tables = self.passes[state] = self._of(state)
        unit = UnitRows.of(state, layer, first, end)
        at = UnitTiles(first, end, state.layout.spans[first].index)
        return TritonUnit(unit.state, unit.layer, unit.spans, unit.runs, rope, at, tables)

    def _of(self, state: PassTensors) -> PassTables:
        assert self.adapters is not None  # or nothing was computed
        columns = Columns()
        attention = attention_tables.put_pass(state.layout, columns)
        staged = self.adapters.device.stage_columns(columns)
        return PassTables(attention(staged), lora_tables.PassTables.of(state, self.adapters))
