"""A simulated device that computes behind its host: it never waits for a plan, and no request waits long for units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler.plan import Plan, View
from coserve_engine.scheduler.schedule import IDLE_SHARE, WAIT_SHARE, decide
from coserve_engine.scheduler.timeline import LEAD_S, Timeline
from coserve_engine.simulate import ahead
from coserve_engine.simulate.device import Host
from coserve_engine.simulate.machine import SIZES
from coserve_engine.simulate.pauses import HEAVY
from coserve_engine.simulate.peers import serving_alone
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.roofline import LLAMA_ON_H200
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate, read_trace
from coserve_engine.simulate.world import World

TRACE = Path(__file__).parents[3] / "examples" / "data" / "AzureLLMInferenceTrace_conv_10min.csv"
SETUP = Setup(LLAMA_ON_H200, tpot_s=0.05, **SIZES["h200"]._asdict())
CAPACITY = 18.0
"""Requests a second that are load 100 %."""


@pytest.fixture(scope="module")
def arrivals() -> list[Arrival]:
    return at_rate(read_trace(TRACE, 150), 0.5 * CAPACITY)


def host_s(setup: Setup) -> float:
    """The longest that planning takes."""
    assert setup.machine.host is not None
    return setup.machine.host.planning_s(setup.max_requests)


@pytest.mark.parametrize("pass_tokens", (512, 4096))
def test_a_request_waits_for_units_a_lead_a_plan_and_a_unit_at_most(
    arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    setup = replace(SETUP, pass_tokens=pass_tokens)
    result = World(setup, arrivals, decide).run()
    assert 0 < result.unit_wait_s <= LEAD_S + host_s(setup) + result.longest_unit_s
    monkeypatch.setattr(Timeline, "unit_at", lambda *_: 0.0)
    eager = World(setup, arrivals, decide).run()
    assert eager.unit_wait_s > LEAD_S + host_s(setup) + eager.longest_unit_s, "the control: all that is planned at once"


def idle_share(setup: Setup, arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the time in which there was something to do, what the device had nothing."""
    idle_s, busy_s = 0.0, 0.0
    enqueue = ahead.Ahead._enqueue

    def spy(self: ahead.Ahead, owner: ahead._Iteration, work: ForwardWork) -> ahead._Enqueued:
        nonlocal idle_s, busy_s
        before_s = self._free_s
        found = enqueue(self, owner, work)
        idle_s, busy_s = idle_s + found.start_s - before_s, busy_s + found.end_s - found.start_s
        return found

    with monkeypatch.context() as patched:
        patched.setattr(ahead.Ahead, "_enqueue", spy)
        World(setup, arrivals, decide).run()
    return idle_s / (idle_s + busy_s)


def test_the_device_does_not_wait_for_its_host(arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch) -> None:
    assert idle_share(SETUP, arrivals, monkeypatch) < 0.01
    hosted = idle_share(replace(SETUP, needs_host=True), arrivals, monkeypatch)
    assert hosted > 2 * idle_share(SETUP, arrivals, monkeypatch), "a plan a forward without units"
    monkeypatch.setattr(Timeline, "plan_at", lambda self, now, **_: self.free_at(now))
    assert idle_share(SETUP, arrivals, monkeypatch) > 0.03, "the control: planned when it is through"


def depths(setup: Setup, arrivals: list[Arrival], policy: Callable[[View, CostModel, int], Plan]) -> list[int]:
    """Of the forwards that give requests a token: how many had no known outcome when they were planned."""
    found: list[int] = []

    def seen(view: View, cost: CostModel, plan_id: int) -> Plan:
        machine = world._machine
        assert isinstance(machine, ahead.Ahead)
        if view.sequences:
            found.append(machine._timeline.unseen)
        return policy(view, cost, plan_id)

    world = World(setup, arrivals, seen)
    world.run()
    return found


def test_one_iteration_runs_ahead_unless_units_let_the_host_see(arrivals: list[Arrival]) -> None:
    alone, beside = depths(SETUP, arrivals, serving_alone), depths(SETUP, arrivals, decide)
    assert max(alone) == max(beside) == 1
    assert sum(alone) > 0.9 * len(alone) and sum(beside) < 0.6 * len(beside)
    assert set(depths(replace(SETUP, needs_host=True), arrivals, serving_alone)) == {0}


def test_a_request_sees_its_tokens_and_no_more(arrivals: list[Arrival]) -> None:
    """Of rows that were launched before the last token was seen nothing comes."""
    for policy in (serving_alone, decide):
        rows, setup = 0, replace(SETUP, kv_pages=120)

        def counted(view: View, cost: CostModel, plan_id: int, policy: Callable = policy) -> Plan:  # type: ignore[type-arg]
            nonlocal rows
            plan = policy(view, cost, plan_id)
            rows += plan.work.decode
            return plan

        result = World(setup, arrivals, counted).run()
        assert all(len(r.gaps_s) == a.output - 1 for r, a in zip(result.requests, arrivals, strict=True))
        assert rows > sum(a.output - 1 for a in arrivals), "some rows were thrown away"


def test_one_request_takes_what_device_and_launches_take() -> None:
    setup = replace(SETUP, noise=0.0)
    result = World(setup, [Arrival(1.0, 2000, 40)], serving_alone).run()
    (times,) = result.requests
    decode_s = LLAMA_ON_H200.forward_s(ForwardWork(decode=1, calls=1, kv_rows=2048, pairs=4 * 2048))
    assert times.gaps_s[20:] == pytest.approx([decode_s] * 19, rel=0.02), "planning is hidden"
    hosted = World(replace(setup, needs_host=True), [Arrival(1.0, 2000, 40)], serving_alone).run().requests[0]
    assert hosted.gaps_s[20:] == pytest.approx([decode_s + SETUP.machine.host.planning_s(1)] * 19, rel=0.02)  # type: ignore[union-attr]


def longest_wait_s(setup: Setup) -> float:
    """Of requests that come when nobody is served, to the first token."""
    arrivals = [Arrival(3.0 * i + 0.37 * (i % 7), 16, 1) for i in range(1, 40)]
    return max(times.first_s for times in World(setup, arrivals, decide).run().requests)


def test_a_forward_that_serves_nobody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replace(SETUP, machine=LLAMA_ON_H200.slower(4), noise=0.0)
    assert longest_wait_s(setup) < WAIT_SHARE * setup.ttft_s + 0.1
    monkeypatch.setattr(ahead, "gives_way", lambda *_: False)
    assert longest_wait_s(setup) > IDLE_SHARE * setup.ttft_s - 0.1


def test_what_the_latency_model_learns_is_the_devices_time(arrivals: list[Arrival]) -> None:
    """Pauses of the host are none of the device, and a slow host makes no forward longer."""

    def run(setup: Setup) -> tuple[Result, CostModel]:
        world = World(setup, arrivals, decide)
        return world.run(), world._cost

    def predicted(cost: CostModel) -> float:
        return cost.forward_s(ForwardWork(decode=60, calls=60, kv_rows=60_000, pairs=240_000))

    base = predicted(run(SETUP)[1])
    host = Host(plan_s=6e-3, request_s=0.0)
    slow, cost = run(replace(SETUP, machine=replace(LLAMA_ON_H200, host=host)))
    assert predicted(cost) == pytest.approx(base, rel=0.05)
    assert slow.error_percent < 6.0
    assert predicted(run(replace(SETUP, pauses=HEAVY))[1]) == pytest.approx(base, rel=0.05)
