"""From a plan to tensors: positions, cache places, attention calls and adapter groups of one forward,
built once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from coserve_engine.kernels.cpu.lora import AdapterRows, LoraGroup, ScatteredRows
from coserve_engine.latency.work import make
from coserve_engine.model.passes import PassState
from coserve_engine.numerics import Numerics, repeat_last
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.kv_cache import PageRun
from coserve_engine.tensors.lora import LoraWeights


class TileCall(NamedTuple):
    """One attention call: rows [start, stop) of the batch, the first of them row `first` of its tile.

    `pages` hold the `kv_length` positions up to the tile's end (null pages where the sequence has none yet).
    """

    start: int
    stop: int
    first: int
    pages: PageRun
    kv_length: int
    want_lse: bool = False
    """Whether a pass keeps the log-sum-exp of these rows."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows [start, stop) of the batch are rows [first, ...) of a pass."""

    state: PassState
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class BoundBatch:
    """A flat batch of T rows: decode, prefill, finetuning, padding."""

    tokens: torch.Tensor
    positions: torch.Tensor
    write_index: torch.Tensor
    singles: tuple[TileCall, ...]
    """Calls of the first rows, one row each: decode."""
    calls: tuple[TileCall, ...]
    adapters: AdapterRows
    kept: tuple[KeptRows, ...]
    sample_rows: torch.Tensor
    """[padded number of rows to sample]; the last is repeated up to the row multiple."""
    sample_slots: tuple[int, ...]
    rows: int
    """Rows that are not padding."""


class Bindable(Protocol):
    """What binding must know of a running request."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def pages(self) -> tuple[int, ...]: ...

    @property
    def weights(self) -> LoraWeights | None:
        """Of its adapter."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A sequence that is no request, as calibration has."""

    tokens: Sequence[int]
    pages: tuple[int, ...]
    weights: LoraWeights | None = None


def bind(
    segments: tuple[Segment, ...],
    sequences: Mapping[int, Bindable],
    passes: Mapping[int, PassState],
    numerics: Numerics,
    device: torch.device,
) -> BoundBatch:
    """Lay out `segments` (decode, then prefill, then finetuning) as one batch."""
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    singles: list[TileCall] = []
    calls: list[TileCall] = []
    sample_rows: list[int] = []
    sample_slots: list[int] = []
    adapter_rows: dict[int, tuple[LoraWeights, list[int]]] = {}
    tuned: list[LoraGroup] = []
    kept: list[KeptRows] = []
    row, page, tile = 0, numerics.page, numerics.tile
    for kind, slot, begin, length, sample in segments:
        if kind is Kind.FINETUNE:
            continue
        sequence, position, end = sequences[slot], begin, begin + length
        pages = sequence.pages
        if length == 1:
            tokens.append(sequence.tokens[position])
            positions.append(position)
            write.append(pages[position // page] * page + position % page)
        else:
            tokens += sequence.tokens[position:end]
            positions += range(position, end)
            write += [pages[p // page] * page + p % page for p in range(position, end)]
        made = singles if kind is Kind.DECODE else calls
        while position < end:
            first = position % tile
            tile_end = position - first + tile
            count = min(end, tile_end) - position
            run = PageRun.covering(pages, tile_end, numerics, device)
            start = row + position - begin
            made.append(make(TileCall, (start, start + count, first, run, tile_end, False)))
            position += count
        if sequence.weights is not None:
            rows = adapter_rows.setdefault(id(sequence.weights), (sequence.weights, []))[1]
            rows.extend(range(row, row + length))
        row += length
        if sample:
            sample_rows.append(row - 1)
            sample_slots.append(slot)
    parts = [_tensor([tokens, positions, write], device)]
    for segment in (s for s in segments if s.kind is Kind.FINETUNE):
        state = passes[segment.slot]
        first, stop = segment.start, segment.start + segment.length
        parts.append(state.places[:, first:stop])
        for span in state.spans:
            if first <= span.start < stop:
                start, tile_end = row + span.start - first, (span.index + 1) * tile
                stop_row = start + span.stop - span.start
                calls.append(make(TileCall, (start, stop_row, 0, state.runs[span], tile_end, state.training)))
        tuned.append(LoraGroup(state.weights, slice(row, row + segment.length), state.drop(slice(first, stop))))
        kept.append(KeptRows(state, row, row + segment.length, first))
        row += segment.length
    padding = numerics.pad(row) - row
    if padding:
        parts.append(_tensor([[0] * padding, [0] * padding, [NULL_PAGE * page] * padding], device))
    places = torch.cat(parts, 1)
    return BoundBatch(
        tokens=places[0],
        positions=places[1],
        write_index=places[2],
        singles=tuple(singles),
        calls=tuple(calls),
        adapters=(*_adapters(adapter_rows.values(), numerics, device), *tuned),
        kept=tuple(kept),
        sample_rows=_tensor(repeat_last(sample_rows, numerics.row_multiple), device),
        sample_slots=tuple(sample_slots),
        rows=row,
    )


def _adapters(parts: Iterable[tuple[LoraWeights, list[int]]], numerics: Numerics, device: torch.device) -> AdapterRows:
    """Rows of requests by adapter: in place where they are neighbours and need no padding, else gathered."""
    in_place: list[LoraGroup] = []
    scattered: list[tuple[LoraWeights, list[int]]] = []
    for weights, rows in parts:
        if rows[-1] - rows[0] == len(rows) - 1 and numerics.pad(len(rows)) == len(rows):
            in_place.append(LoraGroup(weights, slice(rows[0], rows[-1] + 1)))
        else:
            scattered.append((weights, rows))
    return (*in_place, ScatteredRows.of(scattered, numerics.row_multiple, device)) if scattered else tuple(in_place)


def _tensor(values: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
