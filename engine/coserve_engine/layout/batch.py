"""From a plan to where everything lies: rows, cache places, attention calls and adapter groups of one forward, laid out
once for all layers. What tensors that takes is each table's own affair (`kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from coserve_engine.latency.work import make
from coserve_engine.layout.choices import Choice
from coserve_engine.layout.pages import covering, write_places
from coserve_engine.layout.passes import PassLayout
from coserve_engine.numerics import Numerics, repeat_last
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.scheduler.plan import Kind, Segment


class Placed(Protocol):
    """What is laid out of a running request."""

    @property
    def tokens(self) -> Sequence[int]:
        """-1 - n stands for the n-th that the last forward chose, and that the host does not know yet."""

    @property
    def pages(self) -> tuple[int, ...]: ...

    @property
    def adapter(self) -> int | None:
        """An id that sequences of one adapter share."""

    @property
    def scored(self) -> int | None:
        """Of how many of the likeliest tokens log-probabilities are wanted beside those of the tokens that follow its
        rows; None: of none.
        """

    def choice(self) -> Choice:
        """How its next token is chosen."""


class TileCall(NamedTuple):
    """One attention call: rows [start, stop) of the batch, the first of them row `first` of its tile.

    `pages` hold the `tile_end` positions up to the tile's end (null pages where the sequence has none yet).
    """

    start: int
    stop: int
    first: int
    tile_end: int
    pages: tuple[int, ...]
    want_lse: bool = False
    """Whether a pass keeps the log-sum-exp of these rows."""


class AdapterGroup(NamedTuple):
    """Rows of requests that use one adapter, in the batch's order; it is that of the request in `slot`."""

    slot: int
    rows: list[int]


class Scored(NamedTuple):
    """Rows [start, ...) of the request in `slot`, one for each of the `targets`, the tokens that follow them; `top` of
    the likeliest are to be reported as well.
    """

    slot: int
    start: int
    targets: tuple[int, ...]
    top: int


class Window(NamedTuple):
    """Rows [start, stop) of the batch are rows [first, ...) of a pass."""

    pass_id: int
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """A flat batch of T rows: decode, prefill, finetuning, padding.

    Args:
        tokens, positions, write: [T] token, position in the sequence, and place in the pool of each row.
        singles: attention of the first rows, one row each: decode. `calls`: of the others but for padding.
        adapters: of requests; rows of windows have their pass's.
        sample_rows: the last is repeated up to the row multiple; of the `sample_slots`, as many as there are, with
        the `choices` of these.
        rows: those that are not padding.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    write: tuple[int, ...]
    singles: tuple[TileCall, ...]
    calls: tuple[TileCall, ...]
    adapters: tuple[AdapterGroup, ...]
    windows: tuple[Window, ...]
    sample_rows: tuple[int, ...]
    sample_slots: tuple[int, ...]
    choices: tuple[Choice, ...]
    scored: tuple[Scored, ...]
    rows: int

    @property
    def request_rows(self) -> int:
        """Rows of requests: the first ones."""
        return self.windows[0].start if self.windows else self.rows


def lay_out(
    segments: tuple[Segment, ...],
    sequences: Mapping[int, Placed],
    passes: Mapping[int, PassLayout],
    numerics: Numerics,
    least: int = 0,
) -> BatchLayout:
    """Lay out `segments` (decode, then prefill, then finetuning) as one batch of at least so many rows."""
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    singles: list[TileCall] = []
    calls: list[TileCall] = []
    sample_rows: list[int] = []
    sample_slots: list[int] = []
    choices: list[Choice] = []
    scored: list[Scored] = []
    adapters: dict[int, AdapterGroup] = {}
    windows: list[Window] = []
    row, page, tile = 0, numerics.page, numerics.tile
    for kind, slot, begin, length, sample in segments:
        if kind is Kind.FINETUNE:
            continue
        sequence, position, end = sequences[slot], begin, begin + length
        pages = sequence.pages
        if kind is Kind.DECODE:
            first = position % tile
            tile_end = position - first + tile
            tokens.append(sequence.tokens[position])
            positions.append(position)
            write.append(pages[position // page] * page + position % page)
            singles.append(make(TileCall, (row, row + 1, first, tile_end, covering(pages, tile_end, numerics), False)))
        else:
            tokens += sequence.tokens[position:end]
            positions += range(position, end)
            write += write_places(pages, position, end, numerics)
            while position < end:
                first = position % tile
                tile_end = position - first + tile
                count = min(end, tile_end) - position
                start = row + position - begin
                covered = covering(pages, tile_end, numerics)
                calls.append(make(TileCall, (start, start + count, first, tile_end, covered, False)))
                position += count
        adapter = sequence.adapter
        if adapter is not None:
            group = adapters.get(adapter)
            if group is None:
                group = adapters[adapter] = AdapterGroup(slot, [])
            group.rows.extend(range(row, row + length))
        top = sequence.scored
        if top is not None and begin + 1 < len(sequence.tokens):
            scored.append(Scored(slot, row, tuple(sequence.tokens[begin + 1 : end + 1]), top))
        row += length
        if sample:
            sample_rows.append(row - 1)
            sample_slots.append(slot)
            choices.append(sequence.choice())
    for segment in (s for s in segments if s.kind is Kind.FINETUNE):
        rows, first, stop = passes[segment.slot], segment.start, segment.start + segment.length
        tokens += rows.tokens[first:stop]
        positions += rows.positions[first:stop]
        write += rows.write[first:stop]
        for span, covered in zip(rows.spans, rows.pages, strict=True):
            if first <= span.start < stop:
                start, tile_end = row + span.start - first, (span.index + 1) * tile
                stop_row = start + span.stop - span.start
                calls.append(make(TileCall, (start, stop_row, 0, tile_end, covered, rows.training)))
        windows.append(Window(segment.slot, row, row + segment.length, first))
        row += segment.length
    padding = max(numerics.pad(row), least) - row
    return BatchLayout(
        tokens=(*tokens, *([0] * padding)),
        positions=(*positions, *([0] * padding)),
        write=(*write, *([NULL_PAGE * page] * padding)),
        singles=tuple(singles),
        calls=tuple(calls),
        adapters=tuple(adapters.values()),
        windows=tuple(windows),
        sample_rows=tuple(repeat_last(sample_rows, numerics.row_multiple)),
        sample_slots=tuple(sample_slots),
        choices=tuple(choices),
        scored=tuple(scored),
        rows=row,
    )
