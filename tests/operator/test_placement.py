"""Placement: no agent gets more than it takes, the queue is kept, and nobody waits while there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coserve_operator.decide.placement import Waiting, place


def _waiting(*numbers: int) -> list[Waiting]:
    return [Waiting(f"j-{number}", (f"{number:03d}", "")) for number in numbers]


def test_first_come_first_served_to_the_least_loaded(make) -> None:
    agents = {"a": make.heartbeat("p1", saturation=50.0), "b": make.heartbeat("p2", saturation=10.0)}
    assert place(_waiting(2, 1, 3), agents, {}, set(), 64) == {"j-1": "b", "j-2": "a"}


def test_agents_that_drain_leave_or_start_get_nothing(make) -> None:
    agents = {
        "a": make.heartbeat("p1", draining=True),
        "b": make.heartbeat("p2", ready=False),
        "c": make.heartbeat("p3"),
    }
    assert place(_waiting(1), agents, {}, {"c"}, 64) == {}


def test_an_agent_that_still_runs_a_job_gets_no_other(make) -> None:
    agents = {"a": make.heartbeat("p1", jobs={"j-9": (4, 10)})}
    assert place(_waiting(1), agents, {}, set(), 64) == {}
    assert place(_waiting(1), {"a": make.heartbeat("p1")}, {"j-9": "a"}, set(), 64) == {}


@given(data=st.data())
def test_no_agent_is_given_more_jobs_than_it_takes_and_no_room_is_left_unused(make, data: st.DataObject) -> None:
    ids = [f"a{number}" for number in range(data.draw(st.integers(0, 5)))]
    agents = {
        agent: make.heartbeat(
            agent,
            ready=data.draw(st.booleans()),
            draining=data.draw(st.booleans()),
            saturation=data.draw(st.floats(0, 200)),
            max_jobs=data.draw(st.integers(0, 2)),
        )
        for agent in ids
    }
    bound = {f"j-{100 + n}": data.draw(st.sampled_from(ids)) for n in range(3) if ids and data.draw(st.booleans())}
    leaving = {agent for agent in ids if data.draw(st.booleans())}
    waiting = _waiting(*data.draw(st.lists(st.integers(1, 9), unique=True)))
    placed = place(waiting, agents, bound, leaving, 64)
    for agent, beat in agents.items():
        new = sum(holder == agent for holder in placed.values())
        old = sum(holder == agent for holder in bound.values())
        assert new == 0 or (new + old <= beat.max_jobs and beat.ready and not beat.draining and agent not in leaving)
    order = [each.uid for each in sorted(waiting, key=lambda each: each.created)]
    assert list(placed) == order[: len(placed)]
    if len(placed) < len(waiting):
        assert place(waiting[:0] + _waiting(999), agents, bound | placed, leaving, 64) == {}


def test_jobs_are_spread_over_agents_with_several_places(make) -> None:
    agents = {
        "a": make.heartbeat("p1", max_jobs=3, saturation=5.0),
        "b": make.heartbeat("p2", max_jobs=2, saturation=90.0, jobs={"j-9": (4, 10)}),
    }
    placed = place(_waiting(1, 2, 3, 4, 5), agents, {"j-9": "b"}, set(), 64)
    assert placed == {"j-1": "a", "j-2": "a", "j-3": "b", "j-4": "a"}


def test_an_agent_with_more_places_left_but_more_jobs_comes_second(make) -> None:
    agents = {
        "a": make.heartbeat("p1", max_jobs=8, jobs={"j-8": (1, 1), "j-9": (1, 1)}),
        "b": make.heartbeat("p2", max_jobs=1),
    }
    assert place(_waiting(1), agents, {}, set(), 64) == {"j-1": "b"}
