"""Events about one object are bounded, as those of other controllers are."""

from __future__ import annotations

from typing import Any

from operator_fakes import FakeKube

from coserve_operator.apply.events import BURST, EVERY_S, REMEMBERED, EventBudget, Recorder
from coserve_operator.decide.observed import Event
from coserve_operator.kube import ENDPOINT
from coserve_operator.watch.cache import Cache


async def test_an_endpoint_that_flaps_fills_no_etcd(make: Any) -> None:
    kube, endpoint = FakeKube(Cache()), make.endpoint()
    recorder = Recorder(kube, "test")  # type: ignore[arg-type]
    for number in range(200):
        reason = ("AgentsStarting", "AllAgentsReady")[number % 2]
        await recorder.record(ENDPOINT, endpoint.metadata, [Event(reason, "")], make.NOW)
    assert len(kube.events) == BURST
    await recorder.record(ENDPOINT, make.endpoint("other", "e-2").metadata, [Event("Bound", "")], make.NOW)
    assert kube.events[-1] == ("other", "Bound")


def test_after_a_while_there_is_one_more() -> None:
    budget = EventBudget()
    assert [budget.allows("a", 0.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    assert not budget.allows("a", EVERY_S - 1)
    assert budget.allows("a", EVERY_S + 1)
    assert not budget.allows("a", EVERY_S + 2)
    assert not budget.allows("a", 0.0), "a clock that is set back gives nothing"
    long_after = 2 * BURST * EVERY_S
    assert [budget.allows("a", long_after) for _ in range(BURST + 1)] == [True] * BURST + [False]


def test_what_is_remembered_is_bounded() -> None:
    budget = EventBudget()
    for number in range(2 * REMEMBERED):
        assert budget.allows(str(number), 0.0)
    assert len(budget._left) == REMEMBERED
