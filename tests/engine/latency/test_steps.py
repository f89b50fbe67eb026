"""What two lines leave of a number of rows is learnt number by number, and bounds stay close where they would not."""

from __future__ import annotations

import math
import random

import pytest

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.steps import Steps
from coserve_engine.latency.work import ForwardWork

REGIME = Regime(knee=128, step=128, full=1024)
DEAR = {640: 1.15, 1152: 1.25}
"""Rows of which the last wave is dear."""


def test_a_number_is_believed_the_more_the_oftener_it_was_measured() -> None:
    steps = Steps()
    assert steps.factor(1088) == 1.0
    steps.learn(1088, [1.3])
    once = steps.factor(1088)
    steps.learn(1088, [1.3] * 50)
    assert 1.0 < once < 1.1 < steps.factor(1088) < 1.3
    assert steps.factor(1024) == 1.0, "others are not touched"
    steps.learn(1088, [1e9] * 500)
    assert steps.factor(1088) < 1.6


def test_it_follows_a_change() -> None:
    steps = Steps()
    steps.learn(512, [1.2] * 1000)
    steps.learn(512, [0.9] * 200)
    assert steps.factor(512) == pytest.approx(0.9, rel=0.05)


def true_s(rows: int) -> float:
    launched = REGIME.launched(rows)
    return (4e-3 + 2e-5 * max(0, launched - 128)) * DEAR.get(launched, 1.0)


def learnt(source: random.Random, count: int = 1500) -> CostModel:
    cost = CostModel(REGIME)
    for _ in range(count):
        rows = source.choice((100, 200, 500, 600, 1000, 1000, 1000, 1100))
        cost.observe(ForwardWork(prefill=rows), true_s(rows) * math.exp(source.gauss(0, 0.02)), ())
    return cost


def test_dear_numbers_of_rows_are_known_and_the_bound_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = learnt(random.Random(1))
    for rows in (100, 200, 500, 600, 1000, 1100):
        assert cost.forward_s(ForwardWork(prefill=rows)) == pytest.approx(true_s(rows), rel=0.03)
    assert cost.forward_ratio < 1.15
    monkeypatch.setattr(Steps, "factor", lambda *_: 1.0)
    assert learnt(random.Random(1)).forward_ratio > 1.2, "the control: two lines alone"
