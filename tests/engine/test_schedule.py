"""What `decide` promises for any view: who runs, in which order, within which time."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.cost import CostModel
from coserve_engine.numerics import Numerics
from coserve_engine.passes import tile_spans
from coserve_engine.plan import Kind, PassShape, PassView, Plan, Segment, SequenceView, Unit, View, forward_work
from coserve_engine.prefill import CUT, urgency
from coserve_engine.schedule import IDLE_SHARE, decide, fitting_unit
from coserve_engine.work import ForwardWork, UnitWork, decode_work, prefill_work

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

    def unit_s(self, work: UnitWork) -> float:
        return self._row_s * (1 + work.rows + work.pairs / 1000)

    def unit_bound_s(self, work: UnitWork) -> float:
        return 1.25 * self.unit_s(work)


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
    first_tile = max((r for p in view.passes for r, _ in p.shape.tiles), default=0) if not view.sequences else 0
    assert rows(plan) <= max(view.max_batch_tokens, rows(plan, Kind.DECODE), first_tile)
    kinds = [segment.kind for segment in plan.segments]
    assert kinds == sorted(kinds, key=list(Kind).index)
    slots = [segment.slot for segment in plan.segments]
    assert len(set(slots)) == len(slots)
    assert all(segment.length > 0 for segment in plan.segments)


@given(view=views, cost=costs)
def test_prompts_go_by_deadline(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    prompts = sorted((s for s in view.sequences if not s.decoding), key=lambda s: urgency(s, view.ttft_s))
    chunks = of(plan, Kind.PREFILL)
    assert [c.slot for c in chunks] == [p.slot for p in prompts[: len(chunks)]]
    for n, (chunk, prompt) in enumerate(zip(chunks, prompts, strict=False)):
        assert chunk.start == prompt.done
        whole = chunk.length == prompt.known - prompt.done
        assert chunk.sample == whole
        assert whole or n == len(chunks) - 1, "only the last may be cut"
        assert (
            whole
            or (chunk.start + chunk.length) % CUT == 0
            or chunk.length == min(CUT, view.max_batch_tokens - len(of(plan, Kind.DECODE)))
        )


def test_a_far_deadline_does_not_wait_for_ever() -> None:
    patient = prompt(1, 100)._replace(deadline=inf, arrival=NOW - 10)
    plan = decide(view_of(prompt(2, 100), patient, prompt(3, 100)), Linear(), 0)
    assert [c.slot for c in of(plan, Kind.PREFILL)] == [1, 2, 3]


@given(view=views, cost=costs)
def test_a_prompt_never_delays_decoding_past_a_deadline(view: View, cost: Linear) -> None:
    """Unless it is overdue: then it gets a few rows, so that it does not starve."""
    plan = decide(view, cost, 0)
    chunks = of(plan, Kind.PREFILL)
    deadlines = [s.deadline for s in view.sequences if s.decoding]
    if deadlines and chunks:
        by_slot = {s.slot: s for s in view.sequences}
        first = by_slot[chunks[0].slot]
        overdue = view.now > first.deadline + view.ttft_s
        in_time = cost.forward_bound_s(plan.serving) <= min(deadlines) - view.now
        assert in_time or (overdue and len(chunks) == 1 and chunks[0].length <= CUT)


@given(view=views, cost=costs)
def test_no_prompt_starves(view: View, cost: Linear) -> None:
    """The most urgent one gets rows if it is overdue, or if anything fits."""
    plan = decide(view, cost, 0)
    prompts = sorted((s for s in view.sequences if not s.decoding), key=lambda s: urgency(s, view.ttft_s))
    room = view.max_batch_tokens - rows(plan, Kind.DECODE)
    if room > 0 and prompts:
        first, found = prompts[0], of(plan, Kind.PREFILL)
        rest = first.known - first.done
        page = CUT - first.done % CUT
        decode = decode_work([s.done for s in view.sequences if s.decoding], TILE)
        left = min((s.deadline for s in view.sequences if s.decoding), default=inf) - NOW
        small = decode.plus(prefill_work(first.done, min(rest, page), TILE))
        if view.now > first.deadline + view.ttft_s or (page <= room and cost.forward_bound_s(small) <= left):
            assert found and found[0].slot == first.slot


@given(length=st.integers(1, 400), other=st.integers(1, 400), left_ms=st.integers(1, 200))
def test_a_cut_prompt_fills_the_time(length: int, other: int, left_ms: int) -> None:
    """Another page would not fit."""
    cost = Linear(1e-3)
    view = view_of(*decoding(3, left_ms / 1e3), prompt(10, length), prompt(11, other))
    plan = decide(view, cost, 0)
    chunks = {c.slot: c.length for c in of(plan, Kind.PREFILL)}
    if chunks.get(10, 0) < length:
        more = decode_work([200] * 3, TILE).plus(prefill_work(0, min(length, chunks.get(10, 0) + CUT), TILE))
        assert cost.forward_bound_s(more) > left_ms / 1e3 and 11 not in chunks


@given(view=views, cost=costs)
def test_finetuning_waits_for_requests(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    chunks = {c.slot: c.length for c in of(plan, Kind.PREFILL)}
    unfinished = [s for s in view.sequences if not s.decoding and chunks.get(s.slot) != s.known - s.done]
    if view.waiting or unfinished:
        assert rows(plan, Kind.FINETUNE) == 0
        assert plan.units == ()


@given(view=views, cost=costs)
def test_windows_stay_within_the_earliest_deadline(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    if view.sequences and rows(plan, Kind.FINETUNE):
        bound = cost.forward_bound_s(plan.work)
        deadlines = [s.deadline for s in view.sequences if s.decoding]
        assert bound <= (min(deadlines) - view.now if deadlines else view.tpot_s)
        if view.max_slowdown is not None:
            passed = max((NOW - s.deadline + s.tpot_s for s in view.sequences if s.decoding), default=0.0)
            expected = (1 + view.max_slowdown) * cost.forward_s(plan.serving)
            assert cost.forward_s(plan.work) + passed <= expected + 1e-9 or passed < 0


@given(view=views, cost=costs)
def test_a_plan_says_what_it_is_made_of(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    assert plan.work == forward_work(plan.segments, view)
    assert plan.serving == forward_work([s for s in plan.segments if s.kind is not Kind.FINETUNE], view)
    assert plan.forward_s == cost.forward_s(plan.work)
    assert plan.until == pytest.approx(view.now + cost.forward_bound_s(plan.work) + plan.units_s)


def unit_seconds(plan: Plan, view: View, cost: Linear) -> float:
    """Expected seconds of all units, and what the last may take beyond."""
    shapes = {p.id: p.shape for p in view.passes}
    works = [shapes[u.pass_id].backward(u.layer, u.first, u.end) for u in plan.units]
    return sum(map(cost.unit_s, works)) + cost.unit_bound_s(works[-1]) - cost.unit_s(works[-1]) if works else 0.0


def next_decode(plan: Plan) -> ForwardWork:
    return decode_work([s.start + s.length for s in plan.segments if s.sample], TILE)


@given(view=views, cost=costs)
def test_units_leave_room_for_the_next_forward(view: View, cost: Linear) -> None:
    """Units, the turnaround and the decode rows of the next forward fit the time per output token."""
    plan = decide(view, cost, 0)
    if not plan.units:
        return
    if view.sequences:
        slots = {s.slot for s in plan.segments if s.sample}
        gap = min(s.tpot_s for s in view.sequences if s.slot in slots)
        room = gap - cost.turnaround_s - cost.forward_bound_s(next_decode(plan))
        assert unit_seconds(plan, view, cost) <= plan.units_s + 1e-9
        assert plan.units_s <= room + 1e-9
        if view.max_slowdown is not None:
            alone = cost.forward_s(next_decode(plan))
            assert plan.units_s + cost.turnaround_s + alone <= (1 + view.max_slowdown) * alone + 1e-9
    elif len(plan.units) > 1:
        assert unit_seconds(plan, view, cost) <= IDLE_SHARE * view.ttft_s + 1e-9


@given(count=st.integers(1, 40))
def test_units_fill_the_room_that_is_left(count: int) -> None:
    cost = Linear(4e-5)
    owner = PassView(eight_tiles(layers=60), 8, 59, 8)
    view = replace(view_of(*decoding(count)), passes=(owner,))
    plan = decide(view, cost, 0)
    room = 0.2 - cost.turnaround_s - cost.forward_bound_s(next_decode(plan))
    smallest = cost.unit_bound_s(owner.shape.backward(0, 7, 8))
    assert room - smallest <= unit_seconds(plan, view, cost) <= room
    assert plan.units_s == pytest.approx(room)


@given(left_ms=st.integers(0, 40), end=st.integers(1, 8), tiles=st.integers(1, 8))
def test_a_unit_that_does_not_fit_runs_shorter(left_ms: int, end: int, tiles: int) -> None:
    cost, shape = Linear(4e-5), long_pass().shape
    planned = Unit(shape.id, 1, max(0, end - tiles), end)
    found = fitting_unit(planned, shape, cost, left_ms / 1e3)
    bounds = [cost.unit_bound_s(shape.backward(1, first, end)) for first in range(planned.first, end)]
    if found is None:
        assert min(bounds) > left_ms / 1e3
    else:
        assert (found.layer, found.end) == (planned.layer, planned.end)
        assert found.first == planned.first + next(n for n, b in enumerate(bounds) if b <= left_ms / 1e3)


@given(view=views, cost=costs)
def test_windows_go_on_tile_by_tile_oldest_pass_first(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    windows = of(plan, Kind.FINETUNE)
    in_forward = [p for p in view.passes if not p.forward_done]
    assert [w.slot for w in windows] == [p.id for p in in_forward[: len(windows)]]
    for n, (window, owner) in enumerate(zip(windows, in_forward, strict=False)):
        assert window.start == owner.shape.starts[owner.fwd_tile]
        last = owner.shape.starts[-1] + owner.shape.tiles[-1][0]
        assert window.start + window.length in {*owner.shape.starts, last}
        assert window.start + window.length == last or n == len(windows) - 1
        assert not window.sample


def follows(owner: PassView, units: list[Unit]) -> bool:
    """Each unit begins where the one before ended, down to the last layer."""
    layer, end = owner.layer, owner.end_tile
    for unit in units:
        if (unit.layer, unit.end) != (layer, end) or not 0 <= unit.first < unit.end:
            return False
        layer, end = (layer, unit.first) if unit.first else (layer - 1, len(owner.shape.tiles))
    return layer >= (-1 if owner.shape.training else owner.shape.layers - 1)


@given(view=views, cost=costs)
def test_units_go_on_where_backward_stands(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    order = [p.id for p in view.passes]
    assert [order.index(u.pass_id) for u in plan.units] == sorted(order.index(u.pass_id) for u in plan.units)
    covered = {w.slot: w.start + w.length for w in of(plan, Kind.FINETUNE)}
    for owner in view.passes:
        units = [u for u in plan.units if u.pass_id == owner.id]
        assert follows(owner, units)
        if units and owner.fwd_tile < len(owner.shape.tiles):
            assert covered[owner.id] == owner.shape.starts[-1] + owner.shape.tiles[-1][0], (
                "backward needs the whole forward"
            )


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


def finetuning_rows(plan: Plan, view: View) -> int:
    shapes = {p.id: p.shape for p in view.passes}
    return rows(plan, Kind.FINETUNE) + sum(shapes[u.pass_id].backward(*u[1:]).rows for u in plan.units)


@given(view=views, cost=costs, waiting=st.integers(0, 5))
def test_more_waiting_never_gives_finetuning_more(view: View, cost: Linear, waiting: int) -> None:
    calm, busy = (decide(replace(view, waiting=n), cost, 0) for n in (0, waiting))
    assert finetuning_rows(busy, view) <= finetuning_rows(calm, view)


@given(view=calm_views, cost=costs, length=st.integers(1, 300))
def test_a_prompt_never_gives_finetuning_more(view: View, cost: Linear, length: int) -> None:
    """But for `max_slowdown`, which is a share of an iteration that the prompt makes longer."""
    if view.sequences:
        view = replace(view, max_slowdown=None)
        busy = replace(view, sequences=(*view.sequences, prompt(99, length)))
        before, after = decide(view, cost, 0), decide(busy, cost, 0)
        assert rows(after, Kind.FINETUNE) <= rows(before, Kind.FINETUNE)


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


def test_finetuning_waits_while_decode_is_crowded() -> None:
    """A prompt that comes must find room beside the rows that decode."""
    cost = Linear(5e-4)
    plans = [decide(view_of(*decoding(n)), cost, 0) for n in range(1, 60)]
    some = [bool(plan.units) or rows(plan, Kind.FINETUNE) > 0 for plan in plans]
    assert some[0] and not some[-1]
    assert some == sorted(some, reverse=True)


def ran(owner: PassView, plan: Plan) -> PassView:
    """The pass after the plan ran whole."""
    for window in of(plan, Kind.FINETUNE):
        owner = owner._replace(fwd_tile=owner.fwd_tile + window.length // TILE)
    for unit in plan.units:
        layer, end = (unit.layer, unit.first) if unit.first else (unit.layer - 1, 8)
        owner = owner._replace(layer=layer, end_tile=end)
    return owner


@pytest.mark.parametrize("slowdown", (None, 0.0))
def test_a_slow_machine_still_ends_its_job_when_nobody_waits(slowdown: float | None) -> None:
    """Every tile and every unit is far longer than the time per output token."""
    cost, view, plans = Linear(1.0), view_of(slowdown=slowdown), 0
    owner = view.passes[0]
    while owner.layer >= 0:
        plan = decide(replace(view, passes=(owner,)), cost, plans)
        plans += 1
        assert plan.segments or plan.units
        owner = ran(owner, plan)
    assert plans >= 8 + 4 * 8 - 1


@given(slowdown=st.floats(0, 20), more=st.floats(0, 20), count=st.integers(1, 8))
def test_a_larger_slowdown_never_means_a_shorter_iteration(slowdown: float, more: float, count: int) -> None:
    cost, owner = Linear(1e-4), PassView(eight_tiles(layers=60), 8, 59, 8)
    times = []
    for limit in (slowdown, slowdown + more):
        view = replace(view_of(*decoding(count), slowdown=limit), passes=(owner,))
        times.append(decide(view, cost, 0).units_s)
    assert times[0] <= times[1]


def test_passes_are_served_in_the_order_given() -> None:
    first, second = (PassView(PassShape(n, eight_tiles().tiles, 3, True), 8, 3, 8) for n in (7, 3))
    plan = decide(replace(view_of(*decoding(1)), passes=(first, second)), Linear(1e-4), 0)
    assert plan.units and {u.pass_id for u in plan.units} == {7}
    plan = decide(replace(view_of(*decoding(1)), passes=(second, first)), Linear(1e-4), 0)
    assert {u.pass_id for u in plan.units} == {3}


def test_forward_keeps_up_with_backward() -> None:
    """Two passes of a job, always somebody decoding: both ends advance, neither waits for ever for the other."""
    cost, passes, ends = (
        Linear(1e-4),
        {n: PassView(PassShape(n, eight_tiles().tiles, 3, True), 0, 3, 8) for n in (0, 1)},
        0,
    )
    for number in range(2, 200):
        plan = decide(replace(view_of(*decoding(4, 0.1)), passes=tuple(passes.values())), cost, 0)
        for n, owner in list(passes.items()):
            mine = replace(
                plan,
                segments=tuple(s for s in of(plan, Kind.FINETUNE) if s.slot == n),
                units=tuple(u for u in plan.units if u.pass_id == n),
            )
            passes[n] = ran(owner, mine)
            if passes[n].layer < 0:
                del passes[n]
                ends += 1
                passes[1000 * number + n] = PassView(
                    PassShape(1000 * number + n, eight_tiles().tiles, 3, True), 0, 3, 8
                )
    assert ends > 30


def test_nothing_to_do_is_an_empty_plan() -> None:
    plan = decide(View(NOW, (), (), 0, 1.0, 0.2, 512, TILE), Linear(), 0)
    assert (plan.segments, plan.units) == ((), ())


@given(view=views, cost=costs)
def test_the_same_view_gives_the_same_plan(view: View, cost: Linear) -> None:
    assert decide(view, cost, 0) == decide(view, cost, 0)
