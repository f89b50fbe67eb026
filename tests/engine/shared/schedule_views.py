"""Views, costs and readers of plans for the tests of the scheduler."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.work import ForwardWork, UnitWork
from coserve_engine.layout.passes import tile_spans
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, PassShape, PassView, Plan, Segment, SequenceView, View

NOW = 100.0
TILE = 64
REGIME = Regime(knee=128, step=64, full=256)


class Linear(CostModel):
    """So many seconds a row, whatever it is; bounds are half as much again."""

    def __init__(self, row_s: float = 1e-4) -> None:
        super().__init__()
        self._row_s = row_s

    def forward_s(self, work: ForwardWork) -> float:
        return self._row_s * (work.decode + work.prefill + work.finetune + work.pairs / 1000)

    @property
    def forward_ratio(self) -> float:
        return 1.5

    def unit_s(self, work: UnitWork) -> float:
        return self._row_s * (1 + work.rows + work.pairs / 1000)

    def unit_ratio(self, *, head: bool) -> float:
        return 1.25


class Kneed(Linear):
    """The same, but that a forward's rows cost nothing below a knee, and what is launched above it."""

    def __init__(self, row_s: float = 1e-4, regime: Regime = REGIME) -> None:
        super().__init__(row_s)
        self.regime = regime

    def forward_s(self, work: ForwardWork) -> float:
        assert self.regime is not None
        if work.empty:
            return 0.0
        return self._row_s * (max(self.regime.knee, self.regime.launched(work.rows)) + work.pairs / 1000)


tpots, ttfts = st.sampled_from((0.05, 0.2, 0.2)), st.sampled_from((0.2, 1.0, 50.0))


@st.composite
def sequences(draw: st.DrawFn, kinds: tuple[str, ...] = ("decode", "prompt")) -> tuple[SequenceView, ...]:
    found = []
    for slot in range(draw(st.integers(0, 12))):
        arrival = NOW - draw(st.floats(0, 2))
        if draw(st.sampled_from(kinds)) == "decode":
            known = draw(st.integers(2, 500))
            found.append(SequenceView(slot, known - 1, known, NOW + draw(st.floats(-0.1, 0.3)), arrival, draw(tpots)))
        else:
            known = draw(st.integers(1, 400))
            done = draw(st.integers(0, max(0, known - 2)))
            found.append(SequenceView(slot, done, known, arrival + draw(ttfts), arrival, draw(tpots)))
    return tuple(draw(st.permutations(found)))


@st.composite
def passes(draw: st.DrawFn) -> tuple[PassView, ...]:
    found = []
    for number in range(draw(st.integers(0, 3))):
        spans = tile_spans(tuple(draw(st.lists(st.integers(2, 300), min_size=1, max_size=3))), Numerics())
        count, layers, training = len(spans), 3, draw(st.booleans())
        forward = draw(st.integers(0, count))
        layer, end = layers, count
        if forward == count:
            layer, end = draw(st.integers(0 if training else layers, layers)), draw(st.integers(1, count))
        shape = PassShape(
            1000 + number, tuple((s.stop - s.start, (s.index + 1) * TILE) for s in spans), layers, training
        )
        found.append(PassView(shape, forward, layer, end))
    return tuple(found)


views = st.builds(
    View,
    now=st.just(NOW),
    sequences=sequences(),
    passes=passes(),
    waiting=st.sampled_from((0, 0, 0, 1, 5)),
    ttft_s=st.sampled_from((0.2, 1.0)),
    tpot_s=st.sampled_from((0.05, 0.2)),
    max_batch_tokens=st.sampled_from((64, 256, 512)),
    tile=st.just(TILE),
    max_slowdown=st.sampled_from((None, None, 0.0, 0.5, 2.0)),
)
calm_views = st.builds(
    replace,
    views,
    sequences=sequences(("decode",)),
    waiting=st.just(0),
    max_batch_tokens=st.just(512),
)
"""In which finetuning usually runs."""
costs = st.builds(
    lambda make, row_s: make(row_s), st.sampled_from((Linear, Kneed)), st.sampled_from((0.0, 1e-6, 1e-5, 1e-4, 1e-3))
)


def of(plan: Plan, kind: Kind) -> list[Segment]:
    return [segment for segment in plan.segments if segment.kind is kind]


def rows(plan: Plan, *kinds: Kind) -> int:
    return sum(segment.length for segment in plan.segments if not kinds or segment.kind in kinds)


def decoding(count: int, left_s: float = 0.2) -> tuple[SequenceView, ...]:
    return tuple(SequenceView(slot, 200, 201, NOW + left_s, NOW - 1, 0.2) for slot in range(count))


def prompt(slot: int, length: int) -> SequenceView:
    return SequenceView(slot, 0, length, NOW + 1.0, NOW, 0.2)


def eight_tiles(layers: int = 3) -> PassShape:
    return PassShape(1000, tuple((TILE, (n + 1) * TILE) for n in range(8)), layers, True)


def long_pass() -> PassView:
    return PassView(eight_tiles(), 0, 3, 8)


def view_of(*seqs: SequenceView, waiting: int = 0, slowdown: float | None = None) -> View:
    return View(NOW, seqs, (long_pass(),), waiting, 1.0, 0.2, 512, TILE, slowdown)
