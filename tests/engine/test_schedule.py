"""What `decide` promises for any view: who runs, in which order, within which time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.cost import CostModel, ForwardWork, UnitWork
from coserve_engine.numerics import Numerics
from coserve_engine.passes import tile_spans
from coserve_engine.plan import Kind, PassView, Plan, Segment, SequenceView, Unit, View
from coserve_engine.schedule import FINETUNE_PACE, decide, forward_work, sequence_work, unit_work

NOW = 100.0
TILE = 64


class Linear(CostModel):
    """So many seconds a row, whatever it is; bounds are half as much again."""

    def __init__(self, row_s: float = 1e-4) -> None:
        super().__init__()
        self._row_s = row_s

    def forward_s(self, work: ForwardWork) -> float:
        return self._row_s * (work.decode + work.prefill + work.finetune + work.pairs / 1000)

    def forward_bound_s(self, work: ForwardWork) -> float:
        return 1.5 * self.forward_s(work)

    def unit_bound_s(self, work: UnitWork) -> float:
        return self._row_s * (1 + work.rows + work.pairs / 1000)


@st.composite
def sequences(draw: st.DrawFn, kinds: tuple[str, ...] = ("decode", "prompt")) -> tuple[SequenceView, ...]:
    found = []
    for slot in range(draw(st.integers(0, 12))):
        arrival = NOW - draw(st.floats(0, 2))
        if draw(st.sampled_from(kinds)) == "decode":
            known = draw(st.integers(2, 500))
            found.append(SequenceView(slot, known - 1, known, NOW + draw(st.floats(-0.1, 0.3)), arrival))
        else:
            known = draw(st.integers(1, 400))
            done = draw(st.integers(0, max(0, known - 2)))
            found.append(SequenceView(slot, done, known, arrival + 1.0, arrival))
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
        found.append(
            PassView(
                id=1000 + number,
                tiles=tuple((s.stop - s.start, (s.index + 1) * TILE) for s in spans),
                starts=tuple(s.start for s in spans),
                layers=layers,
                fwd_tile=forward,
                layer=layer,
                end_tile=end,
                training=training,
            )
        )
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
)
calm_views = st.builds(
    replace,
    views,
    sequences=sequences(("decode",)),
    waiting=st.just(0),
    max_batch_tokens=st.just(512),
)
"""In which finetuning usually runs."""
costs = st.builds(Linear, st.sampled_from((0.0, 1e-6, 1e-5, 1e-4, 1e-3)))


def of(plan: Plan, kind: Kind) -> list[Segment]:
    return [segment for segment in plan.segments if segment.kind is kind]


def rows(plan: Plan, *kinds: Kind) -> int:
    return sum(segment.length for segment in plan.segments if not kinds or segment.kind in kinds)


@given(view=views, cost=costs)
def test_every_decoding_sequence_gets_its_token(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 7)
    expected = {s.slot: (s.done, 1, True) for s in view.sequences if s.decoding}
    assert {s.slot: (s.start, s.length, s.sample) for s in of(plan, Kind.DECODE)} == expected
    assert len(of(plan, Kind.DECODE)) == len(expected)
    assert plan.id == 7


@given(view=views, cost=costs)
def test_the_batch_has_room_for_what_is_planned(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    first_tile = max((r for p in view.passes for r, _ in p.tiles), default=0) if not view.sequences else 0
    assert rows(plan) <= max(view.max_batch_tokens, rows(plan, Kind.DECODE), first_tile)
    kinds = [segment.kind for segment in plan.segments]
    assert kinds == sorted(kinds, key=list(Kind).index)
    slots = [segment.slot for segment in plan.segments]
    assert len(set(slots)) == len(slots)
    assert all(segment.length > 0 for segment in plan.segments)


@given(view=views, cost=costs)
def test_prompts_are_first_come_first_served(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    prompts = sorted((s for s in view.sequences if not s.decoding), key=lambda s: (s.arrival, s.slot))
    chunks = of(plan, Kind.PREFILL)
    assert [c.slot for c in chunks] == [p.slot for p in prompts[: len(chunks)]]
    for n, (chunk, prompt) in enumerate(zip(chunks, prompts, strict=False)):
        assert chunk.start == prompt.done
        whole = chunk.length == prompt.known - prompt.done
        assert chunk.sample == whole
        assert whole or n == len(chunks) - 1, "only the last may be cut"


@given(view=views, cost=costs)
def test_no_prompt_starves(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    room = view.max_batch_tokens - rows(plan, Kind.DECODE)
    if room > 0 and any(not s.decoding for s in view.sequences):
        first = of(plan, Kind.PREFILL)[0]
        rest = next(s.known - s.done for s in view.sequences if s.slot == first.slot)
        assert first.length >= min(16, room, rest)


@given(view=views, cost=costs)
def test_finetuning_waits_for_requests(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    chunks = {c.slot: c.length for c in of(plan, Kind.PREFILL)}
    unfinished = [s for s in view.sequences if not s.decoding and chunks.get(s.slot) != s.known - s.done]
    if view.waiting or unfinished:
        assert rows(plan, Kind.FINETUNE) == 0
        assert plan.units == ()


@given(view=calm_views, cost=costs)
def test_windows_stay_within_the_earliest_deadline(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    if view.sequences and rows(plan, Kind.FINETUNE):
        bound = cost.forward_bound_s(forward_work(plan.segments, view))
        deadlines = [s.deadline for s in view.sequences if s.decoding]
        if deadlines:
            assert bound <= min(deadlines) - view.now
        else:
            assert bound <= FINETUNE_PACE * view.tpot_s
    assert plan.forward_s == pytest.approx(cost.forward_s(forward_work(plan.segments, view)))


def unit_seconds(plan: Plan, view: View, cost: Linear) -> float:
    by_id = {p.id: p for p in view.passes}
    return sum(cost.unit_bound_s(unit_work(by_id[u.pass_id], u.layer, u.first, u.end)) for u in plan.units)


def next_forward_s(plan: Plan, cost: Linear) -> float:
    """Bound on the decode rows of the next iteration."""
    work = ForwardWork()
    for segment in plan.segments:
        if segment.sample:
            work = work.plus(sequence_work(Kind.DECODE, segment.start + segment.length, 1, TILE))
    return cost.forward_bound_s(work)


@given(view=calm_views, cost=costs)
def test_units_leave_room_for_the_next_forward(view: View, cost: Linear) -> None:
    """The rest of this iteration and the decode rows of the next fit the time per output token."""
    plan = decide(view, cost, 0)
    if view.sequences and plan.units:
        work = forward_work(plan.segments, view)
        early = cost.forward_bound_s(work) - cost.forward_s(work)
        pace = FINETUNE_PACE * view.tpot_s
        assert unit_seconds(plan, view, cost) + next_forward_s(plan, cost) <= pace + early + 1e-9
        assert plan.until <= view.now + cost.forward_bound_s(work) + pace + 1e-9


@given(count=st.integers(1, 40))
def test_units_fill_the_room_that_is_left(count: int) -> None:
    cost, owner = Linear(4e-5), replace(long_pass(), layers=60, fwd_tile=8, layer=59)
    view = replace(view_of(*decoding(count)), passes=(owner,))
    plan = decide(view, cost, 0)
    work = forward_work(plan.segments, view)
    room = FINETUNE_PACE * view.tpot_s - next_forward_s(plan, cost)
    early = cost.forward_bound_s(work) - cost.forward_s(work)
    smallest = cost.unit_bound_s(unit_work(owner, 0, 7, 8))
    assert room - smallest <= unit_seconds(plan, view, cost) <= room + early + 1e-9
    assert plan.until == pytest.approx(view.now + cost.forward_bound_s(work) + room)


@given(view=views, cost=costs)
def test_windows_go_on_tile_by_tile_oldest_pass_first(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    windows = of(plan, Kind.FINETUNE)
    in_forward = [p for p in view.passes if p.fwd_tile < len(p.tiles)]
    assert [w.slot for w in windows] == [p.id for p in in_forward[: len(windows)]]
    for n, (window, owner) in enumerate(zip(windows, in_forward, strict=False)):
        assert window.start == owner.starts[owner.fwd_tile]
        last = owner.starts[-1] + owner.tiles[-1][0]
        assert window.start + window.length in {*owner.starts, last}
        assert window.start + window.length == last or n == len(windows) - 1
        assert not window.sample


def follows(owner: PassView, units: list[Unit]) -> bool:
    """Each unit begins where the one before ended, down to the last layer."""
    layer, end = owner.layer, owner.end_tile
    for unit in units:
        if (unit.layer, unit.end) != (layer, end) or not 0 <= unit.first < unit.end:
            return False
        layer, end = (layer, unit.first) if unit.first else (layer - 1, len(owner.tiles))
    return layer >= (-1 if owner.training else owner.layers - 1)


@given(view=views, cost=costs)
def test_units_go_on_where_backward_stands(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    order = [p.id for p in view.passes]
    assert [order.index(u.pass_id) for u in plan.units] == sorted(order.index(u.pass_id) for u in plan.units)
    covered = {w.slot: w.start + w.length for w in of(plan, Kind.FINETUNE)}
    for owner in view.passes:
        units = [u for u in plan.units if u.pass_id == owner.id]
        assert follows(owner, units)
        if units and owner.fwd_tile < len(owner.tiles):
            assert covered[owner.id] == owner.starts[-1] + owner.tiles[-1][0], "backward needs the whole forward"


def decoding(count: int, left_s: float = 0.2) -> tuple[SequenceView, ...]:
    return tuple(SequenceView(slot, 200, 201, NOW + left_s, NOW - 1) for slot in range(count))


def prompt(slot: int, length: int) -> SequenceView:
    return SequenceView(slot, 0, length, NOW + 1.0, NOW)


def long_pass() -> PassView:
    tiles = tuple((TILE, (n + 1) * TILE) for n in range(8))
    return PassView(1000, tiles, tuple(range(0, 512, TILE)), 3, 0, 3, 8, True)


def view_of(*seqs: SequenceView, waiting: int = 0) -> View:
    return View(NOW, seqs, (long_pass(),), waiting, 1.0, 0.2, 512, TILE)


def test_a_burst_shrinks_the_very_next_plan() -> None:
    cost = Linear(1e-4)
    before = decide(view_of(*decoding(2)), cost, 0)
    assert rows(before, Kind.FINETUNE) >= 4 * TILE
    some = decide(view_of(*decoding(2), prompt(10, 300)), cost, 1)
    assert 0 < rows(some, Kind.FINETUNE) < rows(before, Kind.FINETUNE)
    assert rows(some, Kind.PREFILL) == 300
    burst = decide(view_of(*decoding(2), *(prompt(10 + n, 300) for n in range(4))), cost, 1)
    assert rows(burst, Kind.FINETUNE) == 0
    assert burst.units == ()
    assert rows(decide(view_of(*decoding(2), waiting=1), cost, 1), Kind.FINETUNE) == 0


@given(count=st.integers(0, 40), more=st.integers(1, 40), row_us=st.integers(1, 300))
def test_more_decoding_never_means_more_finetuning(count: int, more: int, row_us: int) -> None:
    cost = Linear(row_us * 1e-6)
    few, many = (decide(view_of(*decoding(n)), cost, 0) for n in (1 + count, 1 + count + more))
    assert rows(many, Kind.FINETUNE) <= rows(few, Kind.FINETUNE)


@given(early=st.floats(0, 0.3), late=st.floats(0, 0.3))
def test_a_nearer_deadline_never_means_more_finetuning(early: float, late: float) -> None:
    early, late = min(early, late), max(early, late)
    cost = Linear(1e-4)
    near, far = (decide(view_of(*decoding(2, left)), cost, 0) for left in (early, late))
    assert rows(near, Kind.FINETUNE) <= rows(far, Kind.FINETUNE)


def test_a_slow_machine_still_ends_its_job_when_nobody_waits() -> None:
    """Every tile and every unit is far longer than the time per output token."""
    cost, view, plans = Linear(1.0), view_of(), 0
    owner = view.passes[0]
    while owner.layer >= 0:
        plan = decide(replace(view, passes=(owner,)), cost, plans)
        plans += 1
        assert plan.segments or plan.units
        for window in plan.segments:
            owner = replace(owner, fwd_tile=owner.fwd_tile + window.length // TILE)
        for unit in plan.units:
            owner = (
                replace(owner, end_tile=unit.first)
                if unit.first
                else replace(owner, layer=unit.layer - 1, end_tile=len(owner.tiles))
            )
    assert plans >= 8 + 4 * 8 - 1


def test_nothing_to_do_is_an_empty_plan() -> None:
    plan = decide(View(NOW, (), (), 0, 1.0, 0.2, 512, TILE), Linear(), 0)
    assert (plan.segments, plan.units) == ((), ())


@given(view=views, cost=costs)
def test_the_same_view_gives_the_same_plan(view: View, cost: Linear) -> None:
    assert decide(view, cost, 0) == decide(view, cost, 0)
