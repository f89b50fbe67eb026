"""Scaling down: one at a time, the cheapest first, never before its jobs were given back or the limit has passed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coserve_operator.decide.observed import PodView
from coserve_operator.decide.scale import RELEASE_LIMIT_S, Held, plan_scale


def _pods(*names: str, **more: float) -> list[PodView]:
    return [PodView(name, f"uid-{name}", ready=True, leaving_since=more.get(name)) for name in names]


def test_up_is_at_once_and_takes_marks_back() -> None:
    plan = plan_scale(3, 1, _pods("a", a=5.0), {}, 10.0)
    assert (plan.replicas, plan.unmark, plan.leaving) == (3, ("a",), frozenset())
    assert plan_scale(2, None, [], {}, 0.0).replicas == 2


def test_an_idle_agent_goes_before_a_job_holder_and_in_one_step() -> None:
    plan = plan_scale(1, 2, _pods("a", "b"), {"a": [Held("j-1", 0)]}, 0.0)
    assert (plan.mark, plan.replicas, plan.leaving) == (("b",), 1, frozenset({"b"}))


def test_of_job_holders_the_one_with_the_freshest_checkpoint_goes_after_it_gave_its_job_back() -> None:
    held = {"a": [Held("j-1", 15)], "b": [Held("j-2", 3)]}
    plan = plan_scale(1, 2, _pods("a", "b"), held, 0.0)
    assert (plan.mark, plan.replicas) == (("b",), 2)
    waiting = plan_scale(1, 2, _pods("a", "b", b=0.0), held, 10.0)
    assert (waiting.mark, waiting.replicas, waiting.leaving) == ((), 2, frozenset({"b"}))
    given_back = plan_scale(1, 2, _pods("a", "b", b=0.0), {"a": held["a"]}, 10.0)
    assert given_back.replicas == 1
    overdue = plan_scale(1, 2, _pods("a", "b", b=0.0), held, RELEASE_LIMIT_S)
    assert overdue.replicas == 1


def test_starting_pods_go_first_since_the_replica_set_takes_them_anyway() -> None:
    pods = [*_pods("a"), PodView("b", "uid-b", ready=False)]
    assert plan_scale(1, 2, pods, {}, 0.0).mark == ("b",)


def test_the_next_victim_waits_until_the_last_is_gone() -> None:
    plan = plan_scale(1, 2, _pods("a", "b", "c", c=0.0), {}, 1.0)
    assert (plan.replicas, plan.mark) == (2, ())


def test_pods_that_do_not_exist_are_given_up_at_once() -> None:
    assert plan_scale(1, 4, _pods("a", "b"), {}, 0.0).replicas == 2


@given(
    desired=st.integers(0, 5),
    jobs=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    unsaved=st.integers(0, 20),
    stubborn=st.booleans(),
)
def test_down_to_the_wish_one_by_one_without_taking_a_job_while_another_is_idle(
    desired: int, jobs: list[int], unsaved: int, stubborn: bool
) -> None:
    pods = {f"p{number}": PodView(f"p{number}", f"u{number}", ready=True) for number in range(len(jobs))}
    held = {f"p{n}": [Held(f"j{n}-{m}", unsaved) for m in range(count)] for n, count in enumerate(jobs)}
    current, now = len(pods), 0.0
    for _ in range(400):
        plan = plan_scale(desired, current, list(pods.values()), held, now)
        assert plan.replicas <= current or desired >= current
        assert len(plan.mark) <= 1
        assert current - plan.replicas <= 1 or desired >= current
        for name in plan.mark:
            assert held.get(name, []) == [] or all(held.get(other) for other in pods), "a job holder before an idle one"
            pods[name] = PodView(name, pods[name].uid, ready=True, leaving_since=now)
        if plan.replicas < current:
            leaving = [name for name in pods if pods[name].leaving_since is not None]
            victim = min(leaving)
            assert not held.get(victim) or now - (pods[victim].leaving_since or 0.0) >= RELEASE_LIMIT_S
            del pods[victim]
            current = plan.replicas
        if current <= desired:
            break
        now += 1.0
        if not stubborn:
            for name in plan.leaving:
                held.pop(name, None)
    assert current == min(desired, len(jobs)) or desired >= len(jobs)
