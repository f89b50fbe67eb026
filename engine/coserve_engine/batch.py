"""From a plan to tensors: positions, cache places, attention calls and adapter groups of one forward,
built once for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from coserve_engine.functional import repeat_last_row
from coserve_engine.kv_cache import PageRun
from coserve_engine.lora import LoraGroup, LoraWeights, RowDropout
from coserve_engine.numerics import Numerics, repeat_last
from coserve_engine.pages import NULL_PAGE
from coserve_engine.passes import PassState
from coserve_engine.plan import Kind, Segment


@dataclass(frozen=True, slots=True)
class TileCall:
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
    groups: tuple[LoraGroup, ...]
    kept: tuple[KeptRows, ...]
    sample_rows: torch.Tensor
    """[padded number of rows to sample]; the last is repeated up to the row multiple."""
    sample_slots: tuple[int, ...]
    rows: int
    """Rows that are not padding."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """What binding must know of a running request: its tokens, its pages and its adapter."""

    tokens: Sequence[int]
    pages: tuple[int, ...]
    weights: LoraWeights | None


def bind(
    segments: tuple[Segment, ...],
    sequences: Mapping[int, SequenceRows],
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
    groups: list[LoraGroup] = []
    kept: list[KeptRows] = []
    row = 0
    for segment in (s for s in segments if s.kind is not Kind.FINETUNE):
        sequence = sequences[segment.slot]
        end = segment.start + segment.length
        tokens += sequence.tokens[segment.start : end]
        positions += range(segment.start, end)
        page = numerics.page
        write += [sequence.pages[p // page] * page + p % page for p in range(segment.start, end)]
        position = segment.start
        while position < end:
            tile_end = (position // numerics.tile + 1) * numerics.tile
            count = min(end, tile_end) - position
            pages = PageRun.covering(sequence.pages, tile_end, numerics, device)
            start = row + position - segment.start
            call = TileCall(start, start + count, position % numerics.tile, pages, tile_end)
            (singles if segment.kind is Kind.DECODE else calls).append(call)
            position += count
        if sequence.weights is not None:
            adapter_rows.setdefault(id(sequence.weights), (sequence.weights, []))[1].extend(
                range(row, row + segment.length)
            )
        row += segment.length
        if segment.sample:
            sample_rows.append(row - 1)
            sample_slots.append(segment.slot)
    parts = [_tensor(tokens, device)], [_tensor(positions, device)], [_tensor(write, device)]
    for segment in (s for s in segments if s.kind is Kind.FINETUNE):
        state = passes[segment.slot]
        first, stop = segment.start, segment.start + segment.length
        for part, source in zip(parts, (state.tokens, state.positions, state.write_index), strict=True):
            part.append(source[first:stop])
        for span in state.spans:
            if first <= span.start < stop:
                start, tile_end = row + span.start - first, (span.index + 1) * numerics.tile
                stop_row = start + span.stop - span.start
                calls.append(TileCall(start, stop_row, 0, state.runs[span], tile_end, state.training))
        drop = state.drop(slice(first, stop))
        if drop is None:
            adapter_rows.setdefault(id(state.weights), (state.weights, []))[1].extend(range(row, row + segment.length))
        else:
            groups.append(lora_group(state.weights, list(range(row, row + segment.length)), numerics, device, drop))
        kept.append(KeptRows(state, row, row + segment.length, first))
        row += segment.length
    padding = numerics.pad(row) - row
    for part, fill in zip(parts, (0, 0, NULL_PAGE * numerics.page), strict=True):
        part.append(torch.full((padding,), fill, dtype=torch.int64, device=device))
    groups += (lora_group(weights, rows, numerics, device) for weights, rows in adapter_rows.values())
    return BoundBatch(
        tokens=torch.cat(parts[0]),
        positions=torch.cat(parts[1]),
        write_index=torch.cat(parts[2]),
        singles=tuple(singles),
        calls=tuple(calls),
        groups=tuple(groups),
        kept=tuple(kept),
        sample_rows=_tensor(repeat_last(sample_rows, numerics.row_multiple), device),
        sample_slots=tuple(sample_slots),
        rows=row,
    )


def lora_group(
    weights: LoraWeights, rows: list[int], numerics: Numerics, device: torch.device, drop: RowDropout | None = None
) -> LoraGroup:
    """The group of `rows`, which are read in place where they are neighbours and need no padding; `drop` has one key
    for each row.
    """
    count = len(rows)
    if rows[-1] - rows[0] == count - 1 and numerics.pad(count) == count:
        return LoraGroup(weights, slice(rows[0], rows[-1] + 1), count, drop)
    if drop is not None:
        drop = RowDropout(repeat_last_row(drop.keys, numerics.row_multiple), drop.p)
    return LoraGroup(weights, _tensor(repeat_last(rows, numerics.row_multiple), device), count, drop)


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
