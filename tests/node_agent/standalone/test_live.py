"""NAME@live answers with the adapter as it is while a job trains it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from coserve_agent.adapters.live import MOST_COPIES, LiveAdapters
from coserve_agent.adapters.served import Served
from coserve_engine.messages import AdapterVersion

MODEL = "fresh@live"


def ask(http: httpx.Client, model: str = MODEL, max_tokens: int = 4) -> httpx.Response:
    body = {"model": model, "prompt": "one two three", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | {"logprobs": 1})


def logprobs(answer: httpx.Response) -> tuple[float, ...]:
    assert answer.status_code == 200, answer.text
    return tuple(answer.json()["choices"][0]["logprobs"]["token_logprobs"])


def listed(http: httpx.Client) -> list[str]:
    return [one["id"] for one in http.get("/v1/models").json()["data"]]


@pytest.fixture
def live(trains: Any) -> LiveAdapters:
    return trains.agent.generator.models._live  # type: ignore[no-any-return]


def test_answers_follow_the_training_and_end_with_the_job(jobs: Any, trains: Any, live: LiveAdapters) -> None:
    assert ask(jobs.http).status_code == 404
    jobs.create("fresh", adapter="fresh", training={"maxSteps": 4000}, publish={"policy": "Never"})
    jobs.until("fresh", lambda job: job["step"] >= 2)
    assert MODEL in listed(jobs.http)
    seen: list[tuple[int, tuple[float, ...]]] = []
    copies: list[int] = []

    def client(number: int) -> None:
        with httpx.Client(base_url=trains.url, timeout=60) as http:
            for _ in range(15):
                before = jobs.get("fresh")["step"]
                seen.append((before, logprobs(ask(http, max_tokens=4 + 4 * number))))
                (alive,) = live._copies.values()
                assert alive[-1].asked_at_step >= before, "a step that was done before is in the answer"
                copies.append(len(alive))

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))
    assert len({said[:4] for _, said in seen}) > 10, "the adapter changes with each step"
    assert max(copies) <= MOST_COPIES
    jobs.post("fresh", "cancel")
    jobs.over("fresh")
    gone = ask(jobs.http)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert MODEL not in listed(jobs.http)
    trains.call(live.sweep)
    assert live._copies == {}
    assert not [one for one in trains.agent.engine._loads if one.uid.endswith("@live")]


def test_between_two_steps_requests_share_a_copy(jobs: Any, trains: Any, live: LiveAdapters) -> None:
    jobs.create("slow", adapter="fresh", training={"maxSteps": 4000}, publish={"policy": "Never"})
    jobs.until("slow", lambda job: job["step"] >= 2)

    def taken() -> Counter[AdapterVersion | None]:
        """By 20 requests that begin at the same step."""
        found = [one.version for one in (live.take(MODEL) for _ in range(20)) if one is not None]
        for version in found:
            assert version is not None
            live.let_go(version)
        return Counter(found)

    (count,) = trains.call(taken).values()
    assert count == 20
    jobs.post("slow", "cancel")
    jobs.over("slow")


def test_no_more_than_so_many_copies_live_whatever_requests_hold(jobs: Any, trains: Any, live: LiveAdapters) -> None:
    jobs.create("held", adapter="fresh", training={"maxSteps": 4000}, publish={"policy": "Never"})
    held: list[Served] = []

    def hold() -> None:
        found = live.take(MODEL)
        assert found is not None
        held.append(found)

    for _ in range(8):
        step = jobs.get("held")["step"]
        jobs.until("held", lambda job, step=step: job["step"] > step + 1)
        trains.call(hold)
    versions = [one.version for one in held]
    assert len(set(versions)) == MOST_COPIES
    assert versions[MOST_COPIES:] == [versions[MOST_COPIES - 1]] * (8 - MOST_COPIES), "else the newest of them"
    for one in held[:2]:
        trains.call(lambda one=one: live.let_go(one.version))
    trains.call(hold)
    assert held[-1].version not in versions, "there is room for a newer one"
    for one in held[2:]:
        trains.call(lambda one=one: live.let_go(one.version))
    assert [len(copies) for copies in live._copies.values()] == [1]
    jobs.post("held", "cancel")
    jobs.over("held")
    trains.call(live.sweep)
