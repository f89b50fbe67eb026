"""Which rows of a batch or of a unit use which adapter, as tables on the device.

What an adapter is in all linears of all layers is one table of its own, made once when a batch first names it: an
iteration sends one number a slot, and a kernel gathers the tables of its slots for all layers. Factors are read as A
[rank, in] and B [out, rank], as they are trained: a trained adapter needs no copy, and each factor serves both ways.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from coserve_engine.config import LINEARS
from coserve_engine.device.protocol import Beside, Columns, Device, Staged, in_turn
from coserve_engine.kernels.dropout import column_fold
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.tensors.lora import LoraWeights
from coserve_engine.tensors.passes import PassTensors, RowDropout

FEW, MANY = 16, 64
"""Rows of a block: the few of decode, the many of prompts and windows."""
GATHERED = 1024


@triton.jit(do_not_specialize=["slots"])
def _gather(
    slots_ptr,  # int64 [slots, 4]
    entries_ptr,  # int64 [SIZE // 4, slots, 4]
    slots,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(slots_ptr + slot * 4)
    there = (at < SIZE) & (address != 0)
    values = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=there, other=0)
    tl.store(entries_ptr + (at // 4 * slots + slot) * 4 + at % 4, values, mask=at < SIZE)


GATHER = Kernel(_gather)


@cache
def _constants(size: int) -> Constants:
    return Constants(SIZE=size, BLOCK=GATHERED)


def gather(slots: torch.Tensor, entries: torch.Tensor) -> None:
    """Fill entries [layers * LINEARS, slots, 4] with the tables of `slots` [slots, 4]; zeros where a slot is free."""
    size = entries.shape[0] * 4
    GATHER.launch((slots.shape[0], cover(size, GATHERED)), _constants(size), slots, entries, slots.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """One adapter on the device.

    Args:
        entries: int64 [layers * LINEARS, 4]: addresses of A [rank, in] and B [out, rank], stored rank, and the bits of
            the float32 scale; zeros where it has no such linear.
        rank: the largest; names: linears that it has in some layer.
        copies: factors that did not lie so.
    """

    entries: torch.Tensor
    rank: int
    names: frozenset[str]
    copies: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, weights: LoraWeights, device: Device) -> AdapterTable:
        copies: list[torch.Tensor] = []

        def address(factor: torch.Tensor) -> int:
            if not factor.is_contiguous():
                factor = factor.contiguous()
                copies.append(factor)
            return address_of(factor)

        entries: list[tuple[int, int, int, int]] = []
        for layer in weights.layers:
            for name in LINEARS:
                pair = layer.get(name)
                if pair is None:
                    entries.append((0, 0, 0, 0))
                else:
                    entries.append((address(pair.a), address(pair.b), pair.a.shape[0], _bits(pair.scale)))
        names = frozenset(name for layer in weights.layers for name in layer)
        rank = max([rank for _, _, rank, _ in entries], default=0)
        return cls(device.stage(entries, torch.int64), rank, names, tuple(copies))


def _bits(value: float) -> int:
    """Of a float32, as an int32."""
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


@dataclass(frozen=True)
class Adapters:
    """Tables of the adapters of an engine, each as long as its tensors are there.

    Args:
        folds: int32 [layers * LINEARS], what a mask's columns are hashed with.
    """

    device: Device
    folds: torch.Tensor
    tables: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    @classmethod
    def create(cls, layers: int, device: Device) -> Adapters:
        folds = [column_fold(layer, linear) for layer in range(layers) for linear in LINEARS]
        return cls(device, device.stage(folds, torch.int32))

    def table(self, weights: LoraWeights) -> AdapterTable | None:
        """Of one adapter; None where it adapts nothing."""
        key = next((pair.a for layer in weights.layers for pair in layer.values()), None)
        if key is None:
            return None
        found: AdapterTable | None = self.tables.get(key)  # type: ignore[no-untyped-call]
        if found is None:
            found = self.tables[key] = AdapterTable.of(weights, self.device)
        return found


@dataclass(frozen=True, slots=True)
class LoraTables:
    """What kernels read of R rows of a batch, or of the rows of a unit.

    Args:
        entries: int64 [layers * LINEARS, slots, 4]: `AdapterTable.entries` of each slot.
        slots: int64 [slots, 4]: address of the adapter's table, or 0; address of the key of the batch's row 0, or 0
            where the slot drops nothing; p * 2^32 - 2^31; the bits of 1 / (1 - p).
        folds: `Adapters.folds`.
        blocks: int64 [B, 4]: the block's first row among the R, its rows, its slot, and where they are: the first
            of neighbours in the batch, or -1 - n where they are listed in `order` from n on.
        order: int64 [listed].
        programs: B.
        rows: R. rank: the largest. names: linears that some adapter has.
        block_rows: the most rows of a block.
        drops: whether some slot drops inputs.
        unit: whether the rows are neighbours of one adapter, in slot 0: then `blocks` and `order` are not read.
        key_row: which key is that of row 0.
        beside: how what only these rows need is computed beside the products of all.
    """

    entries: torch.Tensor
    slots: torch.Tensor
    folds: torch.Tensor
    blocks: torch.Tensor
    order: torch.Tensor
    programs: int
    rows: int
    rank: int
    names: frozenset[str]
    block_rows: int
    drops: bool
    unit: bool = False
    key_row: int = 0
    beside: Beside = in_turn

    def adapts(self, group: tuple[str, ...]) -> bool:
        """Whether a linear of the group has an adapter here."""
        return not self.names.isdisjoint(group)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """What differs from batch to batch."""
        return self.slots, self.blocks, self.order

    @classmethod
    def nobodys(
        cls, adapters: Adapters, slots: int, rows: int, rank: int, block_rows: int = FEW, *, drops: bool = False
    ) -> LoraTables:
        """Of rows that a captured launch finds where they are: at most so many, of at most so many adapters of at most
        such a rank; of none as yet.
        """
        folds, blocks = adapters.folds, slots + (rows - slots) // block_rows
        shapes = ((folds.shape[0], slots, 4), (slots, 4), (blocks, 4), (rows,))
        entries, by_slot, by_block, listed = [folds.new_zeros(shape, dtype=torch.int64) for shape in shapes]
        return cls(
            *(entries, by_slot, folds, by_block, listed),
            programs=blocks,
            rows=rows,
            rank=rank,
            names=frozenset(LINEARS),
            block_rows=block_rows,
            drops=drops,
            beside=adapters.device.beside,
        )

    def fill(self, others: LoraTables | None) -> None:
        """Put rows and adapters of a batch in the place of those of the batch before."""
        torch._foreach_zero_(self.parts)
        if others is not None:
            into = [a[: len(b)] for a, b in zip(self.parts, others.parts, strict=True)]
            torch._foreach_copy_(into, others.parts)
        gather(self.slots, self.entries)


def put(
    layout: BatchLayout,
    sequences: Mapping[int, Adapted],
    passes: Mapping[int, PassTensors],
    adapters: Adapters,
    columns: Columns,
    *,
    alike: bool = False,
) -> Callable[[Staged], LoraTables | None]:
    """Put the rows of each adapter among what will be staged; to be called with that. None where there are none.

    `alike`: blocks are of MANY rows, as a unit's are, however few there are.
    """
    slots: list[int] = []
    blocks: list[int] = []
    order: list[int] = []
    found: list[tuple[AdapterTable, list[int] | range]] = []
    drops = False
    for slot, members in layout.adapters:
        weights = sequences[slot].weights
        assert weights is not None  # or the layout would not name it
        table = adapters.table(weights)
        if table is not None:
            found.append((table, members))
            slots += (address_of(table.entries), 0, *NO_DROP)
    for pass_id, start, stop, first in layout.windows:
        state = passes[pass_id]
        table = adapters.table(state.weights)
        if table is not None:
            drop = state.drop(slice(first, first + stop - start))
            drops = drops or drop is not None
            found.append((table, range(start, stop)))
            slots += (address_of(table.entries), *drop_record(drop, start))
    if not found:
        return lambda staged: None
    most = max([len(members) for _, members in found])
    size = MANY if alike or (most > MANY and len(layout.singles) < layout.rows) else FEW
    row = 0
    for slot, (_, rows) in enumerate(found):
        count, at = len(rows), rows[0]
        step = size
        if rows[-1] - at != count - 1:
            at, step = -1 - len(order), -size
            order += rows
        for begin in range(0, count, size):
            blocks += (row + begin, min(size, count - begin), slot, at)
            at += step
        row += count
    places = [_even(columns, values) for values in (slots, blocks, order or [0])]
    rank = max([table.rank for table, _ in found])
    names = frozenset().union(*[table.names for table, _ in found])

    def tables(staged: Staged) -> LoraTables:
        by_slot, by_block, listed = (staged.ints[at] for at in places)
        by_slot, by_block = by_slot.view(-1, 4), by_block.view(-1, 4)
        entries = by_slot.new_empty(adapters.folds.shape[0], by_slot.shape[0], 4)
        gather(by_slot, entries)
        return LoraTables(
            *(entries, by_slot, adapters.folds, by_block, listed),
            programs=by_block.shape[0],
            rows=row,
            rank=rank,
            names=names,
            block_rows=size,
            drops=drops,
        )

    return tables


def address_of(tensor: torch.Tensor) -> int:
    """Where it begins on its device."""
    return tensor.data_ptr()


NO_DROP = (-(1 << 31), _bits(1.0))


def drop_record(drop: RowDropout | None, start: int) -> tuple[int, int, int]:
    """What a slot says of dropout, for keys of the rows from `start` on."""
    if drop is None:
        return (0, *NO_DROP)
    threshold = min(round(drop.p * 2.0**32) - (1 << 31), (1 << 31) - 1)
    return address_of(drop.keys) - start * drop.keys.element_size(), threshold, _bits(1.0 / (1.0 - drop.p))


def _even(columns: Columns, values: list[int]) -> slice:
    """Put `values` where 16 bytes begin: a launch of tables that lie otherwise would be compiled anew."""
    columns.ints([0] * (len(columns.all_ints) % 2))
    return columns.ints(values)


@dataclass(frozen=True, slots=True)
class PassTables:
    """A pass's adapter, and its tiles for `lora_backward`, staged once a pass.

    Args:
        slot: int64 [1, 4], as `LoraTables.slots`, for keys of the pass's rows.
        tiles: int64 [tiles, 2]: first row in the pass, and rows.
    """

    adapter: AdapterTable
    slot: torch.Tensor
    folds: torch.Tensor
    tiles: torch.Tensor
    drops: bool

    @classmethod
    def of(cls, state: PassTensors, adapters: Adapters) -> PassTables | None:
        """None where its adapter adapts nothing."""
        adapter = adapters.table(state.weights)
        if adapter is None:
            return None
        drop = state.drop(slice(0, state.layout.rows))
        columns = Columns()
        slot = _even(columns, [address_of(adapter.entries), *drop_record(drop, 0)])
        tiles = _even(columns, [n for span in state.layout.spans for n in (span.start, span.stop - span.start)])
        ints = adapters.device.stage_columns(columns).ints
        return cls(adapter, ints[slot].view(1, 4), adapters.folds, ints[tiles].view(-1, 2), drop is not None)

    def rows(self, start: int, stop: int) -> LoraTables:
        """Of rows [start, stop) of the pass."""
        entries, count = self.adapter.entries.unsqueeze(1), stop - start
        return LoraTables(
            *(entries, self.slot, self.folds, self.slot, self.slot),
            programs=cover(count, MANY),
            rows=count,
            rank=self.adapter.rank,
            names=self.adapter.names,
            block_rows=MANY,
            drops=self.drops,
            unit=True,
            key_row=start,
        )
