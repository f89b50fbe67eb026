"""Finetuning shrinks where requests need the time, and never grows with them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from schedule_views import TILE, Linear, calm_views, costs, decoding, prompt, rows, view_of, views

from coserve_engine.scheduler.plan import Kind, Plan, View
from coserve_engine.scheduler.schedule import decide


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
