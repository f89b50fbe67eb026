"""The device's timeline: exact where predictions are, corrected by marks, and never far ahead nor behind."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.scheduler.timeline import LEAD_S, Timeline

seconds = st.floats(1e-4, 2e-2)
works = st.lists(st.tuples(seconds, seconds, st.booleans()), min_size=1, max_size=30)
"""(seconds after the last was enqueued, seconds it takes, whether it is a forward)"""


def device_ends(work: list[tuple[float, float, bool]]) -> list[tuple[float, float, float]]:
    """When each is enqueued, begins and ends on a device that takes one after another."""
    at_s, free_s, found = 0.0, 0.0, []
    for after_s, takes_s, _ in work:
        at_s += after_s
        begins_s = max(at_s, free_s)
        free_s = begins_s + takes_s
        found.append((at_s, begins_s, free_s))
    return found


@given(works)
def test_without_errors_it_says_what_the_device_does(work: list[tuple[float, float, bool]]) -> None:
    timeline, ends = Timeline(), device_ends(work)
    reported = 0
    for id, ((_, takes_s, forward), (at_s, _, end_s)) in enumerate(zip(work, ends, strict=True)):
        while ends[reported][2] <= at_s and reported < id:
            timeline.ended(reported, ends[reported][2])
            reported += 1
        assert timeline.enqueue(takes_s, at_s, forward=forward) == id
        assert timeline.free_at(at_s) == pytest.approx(end_s)
        assert timeline.unseen == sum(forward for _, _, forward in work[reported : id + 1])
    for id in range(reported, len(work)):
        span = timeline.ended(id, ends[id][2])
        assert span.start_s == pytest.approx(ends[id][1]) and span.seconds == pytest.approx(work[id][1])
        assert span.idle_s == pytest.approx(ends[id][1] - ends[id - 1][2] if id else 0.0, abs=1e-12)
    assert timeline.queued_s(ends[-1][2]) == 0.0


@given(works, st.floats(0.5, 2.0), st.data())
def test_marks_correct_what_was_predicted(
    work: list[tuple[float, float, bool]], error: float, data: st.DataObject
) -> None:
    """Whatever the error: from the last mark on, only that of what is not over remains."""
    timeline, ends = Timeline(), device_ends(work)
    for (_, takes_s, forward), (at_s, _, _) in zip(work, ends, strict=True):
        timeline.enqueue(error * takes_s, at_s, forward=forward)
    id = data.draw(st.integers(0, len(work) - 1))
    now = max(ends[id][2], ends[-1][0])
    timeline.ended(id, ends[id][2])
    assert timeline.unseen == sum(forward for _, _, forward in work[id + 1 :])
    left_s = sum(takes_s for _, takes_s, _ in work[id + 1 :])
    overdue_s = now - ends[id][2]
    assert timeline.free_at(now) >= now
    assert abs(timeline.free_at(now) - max(now, ends[-1][2])) <= abs(error - 1) * left_s + overdue_s + 1e-9


def test_what_is_overdue_ends_now() -> None:
    timeline = Timeline()
    first, second = timeline.enqueue(0.010, 0.0, forward=True), timeline.enqueue(0.005, 0.0)
    assert timeline.free_at(0.001) == pytest.approx(0.015)
    assert timeline.free_at(0.020) == pytest.approx(0.025), "the first has not ended, or a mark would say so"
    timeline.started(first, 0.002)
    assert timeline.end_of(first, 0.003) == pytest.approx(0.012)
    timeline.shortened(first, 0.004)
    assert timeline.end_of(second, 0.003) == pytest.approx(0.011)
    assert timeline.ended(second, 0.013).start_s == pytest.approx(0.0), "nothing said when the first ended"
    assert timeline.unseen == 0 and timeline.queued_s(0.013) == 0.0
    with pytest.raises(ValueError, match="not in the queue"):
        timeline.ended(first, 0.012)
    with pytest.raises(ValueError, match="not in the queue"):
        timeline.end_of(first, 0.012)


@given(st.lists(seconds, min_size=2, max_size=40), st.floats(0.0, 4e-3))
def test_units_keep_the_device_busy_and_no_request_waiting(units: list[float], planning_s: float) -> None:
    """Enqueued when they are due, they leave no gap, and never more than a lead, or a plan's time, and one of them."""
    timeline = Timeline()
    for _ in range(3):
        timeline.planned(planning_s)
    now, ends, reported = 0.0, [0.0], 0
    for number, unit_s in enumerate(units):
        now = max(now, timeline.unit_at(now, unit_s))
        assert number == 0 or now <= ends[-1] + 1e-12, "the device had something to do until then"
        while len(ends) - 1 > reported and ends[reported + 1] <= now:
            timeline.ended(reported, ends[reported + 1])
            reported += 1
        timeline.enqueue(unit_s, now)
        ends.append(max(now, ends[-1]) + unit_s)
        assert timeline.queued_s(now) <= max(LEAD_S, planning_s) + unit_s + 1e-9


def test_one_iteration_runs_ahead_and_none_where_the_host_is_needed() -> None:
    timeline = Timeline()
    timeline.planned(0.001)
    assert timeline.plan_at(0.0) <= 0.0 and timeline.begins_at(0.0) == pytest.approx(0.001)
    first = timeline.enqueue(0.010, 0.0, forward=True)
    assert timeline.plan_at(0.0) == pytest.approx(0.010 - LEAD_S - 0.001)
    assert timeline.plan_at(0.0, needs_host=True) == math.inf
    assert timeline.begins_at(0.007) == pytest.approx(0.010)
    timeline.enqueue(0.010, 0.007, forward=True)
    assert timeline.plan_at(0.007) == math.inf, "two outcomes are unknown"
    timeline.ended(first, 0.011)
    assert timeline.plan_at(0.011) == pytest.approx(0.021 - LEAD_S - 0.001)
    assert timeline.plan_at(0.011, needs_host=True) == math.inf
    timeline.ended(1, 0.021)
    assert timeline.plan_at(0.021, needs_host=True) <= 0.021
