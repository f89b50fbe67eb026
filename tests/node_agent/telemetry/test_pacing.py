"""What is measured of promises reaches the metrics and the reserve, and the engine hears of the reserve."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.pacing import CHANGE_S, Pacer
from coserve_agent.telemetry.passage import Cause
from coserve_engine.latency.reserve import START_S, START_SHARE, Reserve
from coserve_engine.messages import IterationDone, SetReserve

TPOT_S = 0.2


@pytest.fixture
def told() -> list[SetReserve]:
    return []


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("base", lambda: 0.0)


@pytest.fixture
def pacer(told: list[SetReserve], metrics: Metrics) -> Pacer:
    return Pacer(Reserve(TPOT_S, 99.0), metrics, told.append)


def iteration(at_s: float, excess_s: float | None) -> IterationDone:
    return IterationDone(at_s, 0.1, at_s + 0.1, 1, 0, 0, 10.0, 0.1, 0.0, excess_s)


def test_the_engine_hears_of_the_reserve_at_once_and_of_changes(pacer: Pacer, told: list[SetReserve]) -> None:
    pacer.tell()
    assert told == [SetReserve(START_SHARE * TPOT_S)]
    pacer.tell()
    assert len(told) == 1, "no news"
    for n in range(round(2 * START_S / 0.1)):
        pacer.iteration(iteration(0.1 * n, -0.01))
    calm_s = told[-1].seconds
    assert calm_s < 0.05 * TPOT_S
    assert all(abs(a.seconds - b.seconds) > CHANGE_S for a, b in pairwise(told))
    pacer.iteration(iteration(1000.0, 0.06))
    assert told[-1].seconds > 0.06


def test_an_iteration_without_finetuning_changes_nothing(pacer: Pacer, told: list[SetReserve]) -> None:
    pacer.tell()
    for n in range(round(2 * START_S / 0.1)):
        pacer.iteration(iteration(0.1 * n, None))
        pacer.gap(0.1 * n, 5.0, None)
    assert len(told) == 1


def test_lateness_and_misses_are_counted_by_cause(pacer: Pacer, metrics: Metrics) -> None:
    pacer.late(Cause.PAUSED, 0.03)
    pacer.missed(Cause.PAUSED)
    value = metrics.registry.get_sample_value
    assert value("coserve_promises_missed_total", {"cause": "paused"}) == 1
    assert value("coserve_promises_missed_total", {"cause": "delivery"}) == 0, "a series from the start"
    assert value("coserve_late_seconds_sum", {"cause": "paused"}) == pytest.approx(0.03)


@pytest.mark.parametrize("stream", (True, False))
def test_an_agent_shows_where_each_token_waited(
    served: Any, client: openai.OpenAI, http: httpx.Client, stream: bool
) -> None:
    answer = client.completions.create(
        model="base", prompt="hello", max_tokens=5, extra_body={"ignore_eos": True}, stream=stream
    )
    name = [chunk.id for chunk in answer].pop() if stream else answer.id
    admin = f"http://127.0.0.1:{served.agent.admin.port}"
    requests = httpx.get(f"{admin}/debug/requests").json()["requests"]
    (path,) = [one for one in requests if one["id"] == f"{name.removeprefix('cmpl-')}-0"]
    assert len(path["tokens"]) == 5
    for emitted_s, received_s, routed_s, handed_s in path["tokens"]:
        assert path["arrival"] < emitted_s <= received_s <= routed_s <= handed_s
    assert httpx.get(f"{admin}/debug/requests?since={path['arrival']}").json()["requests"] == []
    assert "coserve_reserve_seconds" in httpx.get(f"{admin}/metrics").text
