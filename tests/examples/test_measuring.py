"""What the measuring client says, and why a promise counts as missed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from demo.causes import Misses, misses, pauses_said
from demo.client import News, Work
from demo.cluster import Agent
from demo.replay import Sample, Slo
from demo.trace import Recorded
from demo.watch import AgentLog
from hypothesis import given
from hypothesis import strategies as st

SLO = Slo(ttft_s=1.0, tpot_s=0.2)


@given(st.lists(st.tuples(st.sampled_from(("new", "token", "done", "stall", "say")), st.integers(0, 5)), max_size=60))
def test_what_a_client_says_is_what_it_saw(moves: list[tuple[str, int]]) -> None:
    samples: list[Sample] = []
    stalls: list[tuple[float, float]] = []
    heard: list[Sample] = []
    heard_stalls: list[tuple[float, float]] = []
    news = News(samples, stalls)

    def say() -> None:
        News.apply(json.loads(json.dumps(news.take())), heard, heard_stalls)

    for at, (move, number) in enumerate(moves):
        if move == "new":
            samples.append(Sample(float(at), number))
        elif move == "stall":
            stalls.append((at, at + 0.5))
        elif move == "say":
            say()
        elif number < len(samples) and not samples[number].done:
            samples[number].name = f"cmpl-{number}"
            samples[number].token_times_s.append(float(at))
            samples[number].done = move == "done"
    say()
    assert (heard, heard_stalls) == (samples, stalls)
    assert news.take() == {"samples": [], "stalls": []}


def test_work_goes_through_a_line_of_text() -> None:
    work = Work(["http://one"], "tiny", 'a "corpus"\nof lines', "/folder", [Recorded(0.5, 3, 4)])
    assert "\n" not in work.to_json()
    assert Work.from_json(work.to_json()) == work


def seen(name: str, *times_s: float, error: str | None = None) -> Sample:
    return Sample(0.0, len(times_s), list(times_s), name=f"cmpl-{name}", error=error, done=True)


def path(name: str, cause: str | None) -> dict[str, Any]:
    return {"id": f"{name}-0", "cause": cause}


@pytest.mark.parametrize(
    ("sample", "paths", "stalls", "cause"),
    [
        (seen("a", 0.5, 0.6), [path("a", None)], [], None),
        (seen("a", 0.5, 0.9), [path("a", "paused")], [], "paused"),
        (seen("a", 0.5, 0.9), [path("a", None)], [(0.6, 0.8)], "client stood still"),
        (seen("a", 0.5, 0.9), [path("a", None)], [(0.1, 0.4)], "on the way to the client"),
        (seen("a", 1.5), [path("a", None)], [(0.1, 0.9)], "client stood still"),
        (seen("a", 0.5, 0.9), [], [], "unknown: the agent has no record of it"),
        (seen("a", error="500"), [path("a", "waited")], [], "failed"),
    ],
)
def test_a_miss_has_one_cause(
    sample: Sample, paths: list[dict[str, Any]], stalls: list[tuple[float, float]], cause: str | None
) -> None:
    found = misses([sample], SLO, paths, stalls)
    assert found.by_cause == Counter([cause] if cause else [])
    assert cause is None or cause in found.lines()[0]


def test_whether_only_the_machine_is_at_fault() -> None:
    assert Misses(9, Counter({"paused": 2, "client stood still": 1})).only_the_machines
    assert not Misses(9, Counter({"paused": 2, "over_bound": 1})).only_the_machines
    assert not Misses(9, Counter()).only_the_machines


def test_pauses_are_said_since_the_traffic_began() -> None:
    log = AgentLog(Agent("pod", "node", "http://api", "http://admin"))
    for started, paused in ((1.0, 0.5), (11.0, 0.04), (12.0, 0.0)):
        log.iterations.append({"started": started, "duration": 1.0, "paused": paused})
    said = pauses_said([log], 10.0, [(1.0, 1.03)])
    assert "1 of over 20 ms" in said and "longest 40 ms, 2.0 %" in said and "1 times, 30 ms" in said
