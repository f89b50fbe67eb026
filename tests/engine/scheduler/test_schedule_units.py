"""Which windows and units finetuning gets, and how long they may take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_views import TILE, Linear, costs, decoding, eight_tiles, long_pass, of, view_of, views

from coserve_engine.latency.work import ForwardWork, UnitWork, decode_work
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.plan import Kind, PassShape, PassView, Plan, Unit, View
from coserve_engine.scheduler.schedule import IDLE_SHARE, WAIT_SHARE, decide, gives_way


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
        gap = min(s.tpot_s for s in view.sequences if s.slot in slots or not slots)
        room = gap - cost.turnaround_s - cost.forward_bound_s(next_decode(plan))
        assert unit_seconds(plan, view, cost) <= plan.units_s + 1e-9
        assert plan.units_s <= room + 1e-9
        if view.max_slowdown is not None:
            alone = cost.forward_s(next_decode(plan))
            assert plan.units_s + cost.turnaround_s + alone <= (1 + view.max_slowdown) * alone + 1e-9
    elif len(plan.units) > 1:
        assert unit_seconds(plan, view, cost) <= IDLE_SHARE * view.ttft_s + 1e-9


@given(view=views, cost=costs, done=st.floats(0, 1))
def test_only_a_long_forward_that_serves_nobody_gives_way(view: View, cost: Linear, done: float) -> None:
    plan = decide(view, cost, 0)
    rest_s = (1 - done) * cost.forward_s(plan.work)
    assert gives_way(plan, view, cost, done) == (not view.sequences and rest_s > WAIT_SHARE * view.ttft_s)


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


def test_a_unit_that_never_fits_keeps_no_other_pass_back() -> None:
    class SlowHead(Linear):
        def unit_s(self, work: ForwardWork | UnitWork) -> float:
            return 1.0 if isinstance(work, UnitWork) and work.head else 1e-3

    head, layers = (PassView(PassShape(n, eight_tiles().tiles, 3, True), 8, layer, 8) for n, layer in ((1, 3), (2, 2)))
    for passes in ((head, layers), (layers, head)):
        plan = decide(replace(view_of(*decoding(1)), passes=passes), SlowHead(1e-4), 0)
        assert plan.units and {u.pass_id for u in plan.units} == {2}


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
