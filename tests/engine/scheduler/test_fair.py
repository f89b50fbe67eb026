"""Finetuning time is shared by weight: shares converge, nobody starves, and nobody saves up credit."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.scheduler.fair import FairShare

WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), min_size=2)
WORK = st.floats(1.0, 64.0)


def serve(fair: FairShare, jobs: list[str], work: list[float]) -> tuple[Counter[str], list[str]]:
    """Give each piece of work to the job with the first claim; returns work by job and the order of service."""
    done: Counter[str] = Counter()
    served = []
    for amount in work:
        first = fair.order(jobs)[0]
        fair.charge(first, amount)
        done[first] += amount  # type: ignore[assignment]  # a Counter of floats
        served.append(first)
    return done, served


def joined(weights: dict[str, float]) -> FairShare:
    fair = FairShare()
    for job, weight in weights.items():
        fair.join(job, weight)
    return fair


@given(weights=WEIGHTS, work=st.lists(WORK, min_size=1, max_size=400))
def test_no_two_jobs_are_further_apart_than_a_piece_of_work_each(weights: dict[str, float], work: list[float]) -> None:
    """Goyal, Vin and Cheng's bound: |W_f / w_f - W_g / w_g| <= l_f / w_f + l_g / w_g."""
    done, _ = serve(joined(weights), list(weights), work)
    for a, weight in weights.items():
        for b, other in weights.items():
            assert abs(done[a] / weight - done[b] / other) <= max(work) / weight + max(work) / other + 1e-6


@given(weights=WEIGHTS)
def test_shares_converge_to_the_weights(weights: dict[str, float]) -> None:
    done, _ = serve(joined(weights), list(weights), [1.0] * 4000)
    for job, weight in weights.items():
        assert done[job] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.02)


@given(weights=WEIGHTS, work=st.lists(WORK, min_size=300, max_size=300))
def test_nobody_starves(weights: dict[str, float], work: list[float]) -> None:
    """Between two turns of a job all others together do no more than the bound allows."""
    _, served = serve(joined(weights), list(weights), work)
    patience = sum(2 * 64.0 * (w / min(weights.values()) + 1) for w in weights.values())
    waited = dict.fromkeys(weights, 0.0)
    for job, amount in zip(served, work, strict=True):
        for other in waited:
            waited[other] = 0.0 if other == job else waited[other] + amount
            assert waited[other] <= patience


@given(before=st.lists(WORK, min_size=1, max_size=50), work=st.lists(WORK, min_size=50, max_size=50))
def test_a_new_job_has_neither_credit_nor_debt(before: list[float], work: list[float]) -> None:
    fair = joined({"old": 1.0})
    serve(fair, ["old"], before)
    fair.join("new", 1.0)
    done, _ = serve(fair, ["old", "new"], work)
    assert abs(done["old"] - done["new"]) <= 4 * 64.0


@given(alone=st.lists(WORK, min_size=1, max_size=50), work=st.lists(WORK, min_size=50, max_size=50))
def test_a_job_that_slept_has_no_credit(alone: list[float], work: list[float]) -> None:
    fair = joined({"awake": 1.0, "asleep": 1.0})
    serve(fair, ["awake"], alone)
    fair.wake("asleep")
    done, _ = serve(fair, ["awake", "asleep"], work)
    assert abs(done["awake"] - done["asleep"]) <= 4 * 64.0


def test_without_waking_it_would_have() -> None:
    """Negative control: the sleeper would get everything until it has caught up."""
    fair = joined({"awake": 1.0, "asleep": 1.0})
    serve(fair, ["awake"], [64.0] * 100)
    done, _ = serve(fair, ["awake", "asleep"], [64.0] * 50)
    assert done["awake"] == 0


def test_a_job_that_ran_alone_owes_nothing_to_one_that_wakes_first() -> None:
    fair = joined({"early": 1.0, "late": 1.0})
    serve(fair, ["late"], [64.0] * 100)
    fair.wake("early")  # while "late" has nothing to do
    serve(fair, ["early"], [64.0])
    fair.wake("late")
    done, _ = serve(fair, ["early", "late"], [64.0] * 50)
    assert abs(done["early"] - done["late"]) <= 4 * 64.0
