"""From a plan to tensors: positions, cache places, attention calls and adapter groups of one forward,
built once for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from coserve_engine.lora import LoraGroup, LoraWeights
from coserve_engine.numerics import Numerics
from coserve_engine.pages import NULL_PAGE
from coserve_engine.passes import PassState
from coserve_engine.plan import Kind, Segment


@dataclass(frozen=True, slots=True)
class TileCall:
    """One attention call: rows [start, stop) of the batch, the first of them row `first` of its tile.

    `pages` [n] are gathered to `kv_length` keys (up to the tile's end, null pages where the sequence has none yet).
    """

    start: int
    stop: int
    first: int
    padded: int
    pages: torch.Tensor
    kv_length: int
    keep: tuple[PassState, int] | None = None
    """The pass that keeps q, o and lse of these rows, and its first row."""


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


def page_row(pages: tuple[int, ...], tile_end: int, numerics: Numerics) -> list[int]:
    """Pages that cover `tile_end` positions, null where the sequence has none."""
    need = numerics.pages(tile_end)
    return [*pages[:need], *([NULL_PAGE] * (need - len(pages)))]


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
    calls: list[TileCall] = []
    sample_rows: list[int] = []
    sample_slots: list[int] = []
    adapter_rows: dict[int, tuple[LoraWeights, list[int]]] = {}
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
            pages = torch.tensor(page_row(sequence.pages, tile_end, numerics), dtype=torch.int64, device=device)
            start = row + position - segment.start
            calls.append(TileCall(start, start + count, position % numerics.tile, numerics.pad(count), pages, tile_end))
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
                pages = _tensor(page_row(state.page_tables[span.seq], tile_end, numerics), device)
                count = span.stop - span.start
                keep = (state, span.start) if state.training else None
                calls.append(TileCall(start, start + count, 0, numerics.pad(count), pages, tile_end, keep))
        adapter_rows.setdefault(id(state.weights), (state.weights, []))[1].extend(range(row, row + segment.length))
        kept.append(KeptRows(state, row, row + segment.length, first))
        row += segment.length
    padding = numerics.pad(row) - row
    for part, fill in zip(parts, (0, 0, NULL_PAGE * numerics.page), strict=True):
        part.append(torch.full((padding,), fill, dtype=torch.int64, device=device))
    groups = tuple(
        LoraGroup(weights, _tensor(_padded(rows, numerics), device), len(rows))
        for weights, rows in adapter_rows.values()
    )
    return BoundBatch(
        tokens=torch.cat(parts[0]),
        positions=torch.cat(parts[1]),
        write_index=torch.cat(parts[2]),
        calls=tuple(calls),
        groups=groups,
        kept=tuple(kept),
        sample_rows=_tensor(_padded(sample_rows, numerics), device),
        sample_slots=tuple(sample_slots),
        rows=row,
    )


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _padded(rows: list[int], numerics: Numerics) -> list[int]:
    return rows + rows[-1:] * (numerics.pad(len(rows)) - len(rows))
