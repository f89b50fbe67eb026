"""What `decide` promises for any view: who runs, in which order, within which time."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_views import NOW, TILE, Linear, costs, decoding, of, prompt, rows, view_of, views

from coserve_engine.latency.work import ForwardWork, decode_work, prefill_work
from coserve_engine.scheduler.plan import Kind, Plan, View, forward_work
from coserve_engine.scheduler.prefill import CUT, after, patient, urgency
from coserve_engine.scheduler.schedule import decide


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
    for n, (chunk, planned) in enumerate(zip(chunks, prompts, strict=False)):
        assert chunk.start == planned.done
        whole = chunk.length == planned.known - planned.done
        assert chunk.sample == whole
        assert whole or n == len(chunks) - 1, "only the last may be cut"
        assert (
            whole
            or cost.regime is not None
            or (chunk.start + chunk.length) % CUT == 0
            or chunk.length == min(CUT, view.max_batch_tokens - len(of(plan, Kind.DECODE)))
        )


def test_a_far_deadline_does_not_wait_for_ever() -> None:
    late = prompt(1, 100)._replace(deadline=inf, arrival=NOW - 10)
    plan = decide(view_of(prompt(2, 100), late, prompt(3, 100)), Linear(), 0)
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


def can_wait(view: View, cost: Linear, plan: Plan) -> bool:
    """Whether, on a device with a knee, what the plan leaves of prompts bears finetuning beside it."""
    decode = decode_work([s.done for s in view.sequences if s.decoding], TILE)
    rest = after([s for s in view.sequences if not s.decoding], of(plan, Kind.PREFILL))
    return patient(rest, view, cost, decode)


@given(view=views, cost=costs)
def test_finetuning_waits_for_requests(view: View, cost: Linear) -> None:
    plan = decide(view, cost, 0)
    chunks = {c.slot: c.length for c in of(plan, Kind.PREFILL)}
    unfinished = [s for s in view.sequences if not s.decoding and chunks.get(s.slot) != s.known - s.done]
    if view.waiting or (unfinished and not can_wait(view, cost, plan)):
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
    assert plan.until == pytest.approx(view.now + cost.forward_bound_s(plan.work) + plan.units_s)


def test_nothing_to_do_is_an_empty_plan() -> None:
    plan = decide(View(NOW, (), (), 0, 1.0, 0.2, 512, TILE), Linear(), 0)
    assert (plan.segments, plan.units) == ((), ())


@given(view=views, cost=costs)
def test_the_same_view_gives_the_same_plan(view: View, cost: Linear) -> None:
    assert decide(view, cost, 0) == decide(view, cost, 0)


# ---- the reserve ----


@given(view=views, cost=costs, reserve_s=st.floats(0.0, 0.2))
def test_finetuning_keeps_the_reserve_free(view: View, cost: Linear, reserve_s: float) -> None:
    plan = decide(replace(view, reserve_s=reserve_s), cost, 0)
    decode = [s for s in view.sequences if s.decoding]
    if decode and of(plan, Kind.FINETUNE):
        due_s = min(s.deadline for s in decode) - view.now
        assert cost.forward_bound_s(plan.work) <= due_s - reserve_s + 1e-9
    if view.sequences and plan.units:
        gap_s = min(s.tpot_s for s in view.sequences)
        following_s = cost.forward_bound_s(decode_work([s.known for s in view.sequences], TILE))
        assert plan.units_s + following_s <= gap_s - reserve_s + 1e-9


@given(view=views, cost=costs)
def test_everybody_who_decodes_gets_a_token_whatever_the_reserve(view: View, cost: Linear) -> None:
    plan = decide(replace(view, reserve_s=10.0), cost, 0)
    assert len(of(plan, Kind.DECODE)) == sum(s.decoding for s in view.sequences)
    if any(s.decoding for s in view.sequences):
        assert not of(plan, Kind.FINETUNE) and not plan.units


def test_prompts_keep_the_reserve_free_while_they_are_in_time_with_it() -> None:
    """300 rows beside 20 that decode; a row takes 1 ms, the gap is 200 ms, of which 100 are kept free."""

    def seconds_with_the_prompt(left_s: float) -> float:
        late = prompt(99, 300)._replace(deadline=NOW + left_s)
        view = replace(view_of(*decoding(20), late), reserve_s=0.1)
        plan = decide(view, Linear(1e-3), 0)
        assert len(of(plan, Kind.PREFILL)) == 1
        return Linear(1e-3).forward_bound_s(plan.work)

    in_time_s, hurried_s = seconds_with_the_prompt(5.0), seconds_with_the_prompt(0.7)
    assert in_time_s <= 0.1 < hurried_s <= 0.2


class Crowded(Linear):
    """20 ms for each that decodes and 1 ms for a row of a prompt; bounds are half as much again."""

    def forward_s(self, work: ForwardWork) -> float:
        return 0.02 * work.decode + 1e-3 * work.prefill


def test_a_prompt_goes_on_early_where_nothing_fits_beside_the_whole_reserve() -> None:
    """Two that decode need 60 ms of a gap of 200, a cut of 16 rows 24 more: with 120 kept free the prompt would stand
    still until it had no time left.
    """
    waiting = prompt(99, 96)._replace(deadline=NOW + 0.8)
    plan = decide(replace(view_of(*decoding(2), waiting), reserve_s=0.12), Crowded(), 0)
    assert rows(plan, Kind.PREFILL) == 32
    assert Crowded().forward_bound_s(plan.work) <= 0.2 - 0.75 * 0.12


def test_a_prompt_is_to_be_done_a_reserve_before_its_deadline() -> None:
    """Beside the whole reserve of 100 ms it takes 8 iterations of 56 ms: and a pause fit into 650, not 550."""

    def kept_s(left_s: float) -> float:
        waiting = prompt(99, 128)._replace(deadline=NOW + left_s)
        plan = decide(replace(view_of(*decoding(2), waiting), reserve_s=0.1), Crowded(), 0)
        return 0.2 - Crowded().forward_bound_s(plan.work)

    assert kept_s(0.65) >= 0.1 > kept_s(0.55)
