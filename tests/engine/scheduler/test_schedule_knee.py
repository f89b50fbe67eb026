"""Where a device has a knee: forwards are filled, prompts that can wait share the gap, units end with full waves."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_views import NOW, TILE, Kneed, Linear, decoding, eight_tiles, of, passes, prompt, rows, view_of, views

from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler import finetuning
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.plan import Kind, PassView, SequenceView, Unit, View, full_rows
from coserve_engine.scheduler.schedule import decide

COST = Kneed(1e-4)  # 256 rows fill it in 26 ms
FULL = 256


def busy(*prompts: SequenceView, passes: tuple[PassView, ...] = ()) -> View:
    """Three that decode, with these prompts and passes."""
    return replace(view_of(*decoding(3), *prompts), passes=passes)


WAITING, READY = PassView(eight_tiles(), 0, 3, 8), PassView(eight_tiles(30).like(1001), 8, 30, 8)
"""Backward of the one takes far longer than forward of the other."""


def test_prompts_that_can_wait_leave_units_in_the_gap() -> None:
    view = busy(prompt(10, 400), prompt(11, 400), passes=(READY, WAITING))
    plan = decide(view, COST, 0)
    assert plan.units and rows(plan, Kind.PREFILL) > 0 and rows(plan) <= FULL
    hurried = replace(view, sequences=tuple(s._replace(deadline=NOW + 0.21) for s in view.sequences))
    assert decide(hurried, COST, 0).units == (), "all their time is theirs"
    assert decide(view, Linear(1e-4), 0).units == (), "where there is no knee a forward that ends early is no loss"


def test_windows_go_before_prompts_that_can_wait_where_units_would_soon_have_no_pass() -> None:
    prompts = prompt(10, 250), prompt(11, 250)
    dry = decide(busy(*prompts, passes=(WAITING,)), COST, 0)
    assert rows(dry, Kind.FINETUNE) >= 2 * TILE and rows(dry, Kind.PREFILL) > 0
    assert FULL - rows(dry) < 16, "prompts fill what windows leave"
    assert dry.serving == ForwardWork(3, rows(dry, Kind.PREFILL), 0, *dry.serving[3:])
    ready = decide(busy(*prompts, passes=(READY, WAITING)), COST, 0)
    assert rows(ready, Kind.FINETUNE) == 0 and FULL - rows(ready) < 16


def test_a_forward_with_a_prompt_in_it_is_filled() -> None:
    """Though the pass could wait."""
    assert decide(busy(passes=(READY, WAITING)), COST, 0).work.finetune <= 2 * TILE
    assert FULL - rows(decide(busy(prompt(10, 60), passes=(READY, WAITING)), COST, 0)) < TILE


@given(view=views, more=passes())
def test_a_plan_with_a_knee_counts_what_it_plans(view: View, more: tuple[PassView, ...]) -> None:
    """Windows may have come before prompts: the counts of serving are those of decode rows and prompts alone."""
    plan = decide(replace(view, passes=more, waiting=0), COST, 0)
    assert plan.work.rows == rows(plan) and plan.work.finetune == rows(plan, Kind.FINETUNE)
    assert plan.serving.rows == rows(plan, Kind.DECODE, Kind.PREFILL) and plan.serving.finetune == 0
    windows = of(plan, Kind.FINETUNE)
    assert plan.work.calls - plan.serving.calls == sum(
        end - first for first, end in (next(p for p in more if p.id == w.slot).shape.tiles_of(w) for w in windows)
    )


@pytest.mark.parametrize(("gap_s", "expected"), [(0.2, 256), (0.03, 128), (0.015, 64)])
def test_a_forward_that_fills_the_device_fits_the_gap(gap_s: float, expected: int) -> None:
    """The bound of 256 rows is 38 ms, of 128 and of 64 below the knee 19."""
    view = busy(passes=(WAITING,))
    short = replace(view, sequences=tuple(s._replace(tpot_s=gap_s) for s in view.sequences))
    assert full_rows(short, COST) == expected


@given(left_ms=st.floats(0, 60), end=st.integers(1, 8), first=st.integers(0, 7))
def test_units_are_shortened_by_whole_waves(left_ms: float, end: int, first: int) -> None:
    cost = Kneed(1e-4, Regime(knee=64, step=64, full=128))
    planned = Unit(1001, 1, min(first, end - 1), end)
    found = fitting_unit(planned, READY.shape, cost, left_ms / 1e3)
    assert found is None or found == planned or ((found.end - found.first) % 2 == 0 and found.first > planned.first)
    if found is not None:
        assert cost.unit_bound_s(READY.shape.backward(*found[1:])) <= left_ms / 1e3
    one = fitting_unit(planned, READY.shape, Linear(1e-4), left_ms / 1e3)
    assert found is None or (one is not None and one.first <= found.first)


@given(budget_ms=st.floats(1, 200))
def test_no_gap_ends_with_a_unit_of_a_part_of_a_wave(budget_ms: float) -> None:
    cost = Kneed(1e-4, Regime(knee=64, step=64, full=128))
    found = finetuning.units((READY,), cost, budget_ms / 1e3, inf)
    assert all((unit.end - unit.first) % 2 == 0 for unit in found[1:])


def test_what_is_free_is_what_the_model_says_takes_no_longer() -> None:
    """Not what lies below the knee: that is vague."""
    vague = Kneed(1e-4, Regime(knee=256, step=64, full=512))
    true = Kneed(1e-4, Regime(knee=128, step=64, full=512))
    view = busy(passes=(READY, WAITING))
    vague.forward_s = true.forward_s  # type: ignore[method-assign]
    assert rows(decide(view, vague, 0)) == rows(decide(view, true, 0)) <= 128
