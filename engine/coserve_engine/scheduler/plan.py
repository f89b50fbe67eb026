"""What an iteration is decided from, what is decided, and what came of it: ints, floats and ids only, so
that a simulator can share it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import (
    NO_WORK,
    ForwardWork,
    Reaches,
    UnitWork,
    decode_work,
    keys_read,
    make,
    mean_reaches,
    prefill_work,
)


class Kind(Enum):
    DECODE = "decode"
    PREFILL = "prefill"
    FINETUNE = "finetune"


class Segment(NamedTuple):
    """Rows [start, start + length) of a sequence (`slot`) or of a pass (`slot` is its id; rows of the pass)."""

    kind: Kind
    slot: int
    start: int
    length: int
    sample: bool = False
    """Whether the last row's logits choose a token."""


class Unit(NamedTuple):
    """Backward of tiles [first, end) of a pass in one layer; layer = model's layers is the head.

    `end` is where backward stands.
    """

    pass_id: int
    layer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """An upper bound: the forward runs whole, then a prefix of the units, the last of them perhaps shortened.

    `until` bounds the end of the iteration as a whole; units also end `units_s` after the forward did, because it is
    from there that the next token's time runs.
    """

    id: int
    segments: tuple[Segment, ...]
    units: tuple[Unit, ...]
    until: float
    units_s: float
    work: ForwardWork
    """Counts of the forward."""
    serving: ForwardWork
    """Those of its decode and prefill rows."""


class SequenceView(NamedTuple):
    """A running request: `done` tokens are in the cache, `known` tokens are known (prompt and sampled), the
    next token is due at `deadline` and each later one `tpot_s` after the one before. One that `needs_host` cannot be
    planned before its last token is known there.
    """

    slot: int
    done: int
    known: int
    deadline: float
    arrival: float
    tpot_s: float
    needs_host: bool = False

    @classmethod
    def of(
        cls,
        slot: int,
        done: int,
        known: int,
        arrival: float,
        last: float | None,
        ttft_s: float,
        tpot_s: float,
        needs_host: bool = False,
    ) -> SequenceView:
        """The deadline rule: the first token within `ttft_s` of arrival, each later one within `tpot_s` of the `last`
        (None: there is none yet).
        """
        deadline = arrival + ttft_s if last is None else last + tpot_s
        return make(cls, (slot, done, known, deadline, arrival, tpot_s, needs_host))

    @property
    def decoding(self) -> bool:
        return self.known - self.done == 1 and self.done > 0


def split(sequences: Sequence[SequenceView]) -> tuple[list[SequenceView], list[SequenceView]]:
    """Those that decode, and those with more of a prompt to compute."""
    decoding = [s for s in sequences if s.decoding]
    prompts = [s for s in sequences if not s.decoding] if len(decoding) < len(sequences) else []
    return decoding, prompts


def decode_segments(decoding: list[SequenceView]) -> list[Segment]:
    """The next row of each, and a token of it."""
    kind = Kind.DECODE
    return [make(Segment, (kind, s.slot, s.done, 1, True)) for s in decoding]


class PassShape:
    """What does not change while a pass is live: its tiles as (rows, keys up to a tile's end), and where each starts.

    `reaches` are the layers' (`Numerics.reaches`); empty: every layer reads all keys. Units of layers of the same of
    `kinds` count the same; the head's kind is the last. Counts are made once and kept.
    """

    __slots__ = (
        "_backward",
        "_forward",
        "_kind_pairs",
        "_kv",
        "_pairs",
        "_rows",
        "id",
        "kinds",
        "layers",
        "rows",
        "starts",
        "tiles",
        "training",
    )

    def __init__(
        self,
        id: int,
        tiles: tuple[tuple[int, int], ...],
        layers: int,
        training: bool,
        reaches: tuple[int | None, ...] = (),
    ) -> None:
        self.id, self.tiles, self.layers, self.training = id, tiles, layers, training
        self._rows = (0, *accumulate(rows for rows, _ in tiles))
        mean = mean_reaches(reaches)
        self._kv = (0, *accumulate(keys_read(kv, mean) for _, kv in tiles))
        self._pairs = (0, *accumulate(rows * keys_read(kv, mean) for rows, kv in tiles))
        distinct = list(dict.fromkeys(reaches or (None,)))
        self.kinds = (*(distinct.index(reach) for reach in reaches or (None,) * layers), len(distinct))
        self._kind_pairs = (
            *((0, *accumulate(rows * min(kv, reach or kv) for rows, kv in tiles)) for reach in distinct),
            (0,) * (len(tiles) + 1),
        )
        self._forward: dict[tuple[int, int], ForwardWork] = {}
        self._backward: dict[tuple[int, int, int], UnitWork] = {}
        self.starts = self._rows[:-1]
        self.rows = self._rows[-1]

    def like(self, id: int) -> PassShape:
        """The shape of another pass, `id`, of the same tiles."""
        shape = copy(self)
        shape.id = id
        return shape

    def forward(self, first: int, end: int) -> ForwardWork:
        """Counts of tiles [first, end) in forward."""
        found = self._forward.get((first, end))
        if found is None:
            rows, kv, pairs = (sums[end] - sums[first] for sums in (self._rows, self._kv, self._pairs))
            found = self._forward[first, end] = ForwardWork(0, 0, int(rows), end - first, kv, pairs)
        return found

    def backward(self, layer: int, first: int, end: int) -> UnitWork:
        """Counts of a unit."""
        kind = self.kinds[layer]
        found = self._backward.get((kind, first, end))
        if found is None:
            pairs = self._kind_pairs[kind]
            rows = self._rows[end] - self._rows[first]
            found = UnitWork(layer == self.layers, rows, end - first, pairs[end] - pairs[first])
            self._backward[kind, first, end] = found
        return found

    def window(self, first: int, end: int) -> Segment:
        """The rows of tiles [first, end)."""
        start = self._rows[first]
        return Segment(Kind.FINETUNE, self.id, start, self._rows[end] - start)

    def tiles_of(self, window: Segment) -> tuple[int, int]:
        """The tiles [first, end) of a window of this pass."""
        return self.starts.index(window.start), bisect_left(self.starts, window.start + window.length)


class PassView(NamedTuple):
    """A live pass and the cursors of forward and backward."""

    shape: PassShape
    fwd_tile: int
    layer: int
    end_tile: int

    @property
    def id(self) -> int:
        return self.shape.id

    @property
    def forward_done(self) -> bool:
        return self.fwd_tile == len(self.shape.tiles)

    @property
    def last_layer(self) -> int:
        """Where backward ends: an evaluation needs the head alone."""
        return 0 if self.shape.training else self.shape.layers


@dataclass(frozen=True, slots=True)
class View:
    """All that a policy may look at."""

    now: float
    sequences: tuple[SequenceView, ...]
    passes: tuple[PassView, ...]
    """In the order in which they are to be served."""
    waiting: int
    """Requests that have no slot or no pages yet."""
    ttft_s: float
    tpot_s: float
    max_batch_tokens: int
    tile: int
    max_slowdown: float | None = None
    """With finetuning an iteration may take 1 + this times the time it is predicted to take without; None: no limit."""
    reaches: Reaches = ()
    """Of the model's sliding windows."""
    reserve_s: float = 0.0
    """Seconds of each gap between two tokens that stay free for what no plan foresees."""
    max_window_rows: int | None = None
    """Rows of one forward beyond which no window goes; None: `max_batch_tokens`."""

    @property
    def window_limit(self) -> int:
        """Rows of a forward with windows in it."""
        return self.max_batch_tokens if self.max_window_rows is None else self.max_window_rows


Policy: TypeAlias = Callable[[View, CostModel, int], Plan]
"""(view, latency model, id of the plan) -> plan."""


def full_rows(view: View, cost: CostModel) -> int:
    """Rows with which a forward fills the device, fewer where so many would take longer than the gap between two
    tokens; to be asked only where the latency model has a knee.
    """
    assert cost.regime is not None
    rows, gap_s = cost.regime.full, min([s.tpot_s for s in view.sequences], default=view.tpot_s) - view.reserve_s
    while rows > cost.regime.step and cost.forward_bound_s(ForwardWork(prefill=rows)) > gap_s:
        rows //= 2
    return rows


def forward_work(segments: tuple[Segment, ...] | list[Segment], view: View) -> ForwardWork:
    """Counts of these segments in one forward."""
    total = decode_work([s.start for s in segments if s.kind is Kind.DECODE], view.tile, view.reaches)
    shapes = {p.shape.id: p.shape for p in view.passes}
    for segment in segments:
        if segment.kind is Kind.PREFILL:
            total = total.plus(prefill_work(segment.start, segment.length, view.tile, view.reaches))
        elif segment.kind is Kind.FINETUNE:
            shape = shapes[segment.slot]
            total = total.plus(shape.forward(*shape.tiles_of(segment)))
    return total


def empty_plan(plan_id: int, now: float) -> Plan:
    """Nothing to do."""
    return Plan(plan_id, (), (), now, 0.0, NO_WORK, NO_WORK)
