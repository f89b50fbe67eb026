"""On a simulated H200 the two-regime latency model fills the slack and keeps the promise; one line does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coserve_engine.scheduler.plan import Policy
from coserve_engine.scheduler.schedule import decide
from coserve_engine.simulate import machine
from coserve_engine.simulate.bound import work_conserving_bound
from coserve_engine.simulate.machine import CPU, SIZES, calibrated
from coserve_engine.simulate.peers import serving_alone
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.roofline import LLAMA_ON_H200
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate, read_trace
from coserve_engine.simulate.world import World, alone_tokens_per_s

TRACE = Path(__file__).parents[3] / "examples" / "data" / "AzureLLMInferenceTrace_conv_10min.csv"
SETUP = Setup(LLAMA_ON_H200, tpot_s=0.05, **SIZES["h200"]._asdict())
CAPACITY = 18.0
"""Requests a second that are load 100 %."""


@pytest.fixture(scope="module")
def trace() -> list[Arrival]:
    return read_trace(TRACE, 250)


@pytest.fixture(scope="module")
def alone() -> float:
    return alone_tokens_per_s(SETUP, 20.0)


def run(trace: list[Arrival], load: float, policy: Policy = decide, setup: Setup = SETUP) -> Result:
    return World(setup, at_rate(trace, load * CAPACITY), policy).run()


def share(result: Result, alone: float, trace: list[Arrival]) -> float:
    """Of the work-conserving bound."""
    bound = work_conserving_bound(SETUP, trace, len(trace) / result.seconds)
    return result.finetune_tokens_per_s / alone / bound


def test_the_slack_is_filled_and_the_promise_kept(trace: list[Arrival], alone: float) -> None:
    """Goodput over all loads: of one load's few requests a single late iteration costs several."""
    kept, kept_alone = 0.0, 0.0
    for load in (0.3, 0.5, 0.7):
        both, serving = run(trace, load), run(trace, load, serving_alone)
        assert share(both, alone, trace) >= 0.9
        assert both.over_bound <= max(2, both.iterations // 1000)
        assert both.error_percent < 5.0
        kept, kept_alone = kept + both.strict_percent, kept_alone + serving.strict_percent
    assert kept >= 0.99 * kept_alone


def test_with_one_line_through_both_regimes_it_is_not(
    trace: list[Arrival], alone: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "may_have_knee", lambda *_: False)
    assert share(run(trace, 0.5), alone, trace) < 0.85


def test_a_cpu_has_no_knee_and_an_h200_has_one() -> None:
    import random  # noqa: PLC0415

    assert calibrated(CPU, 64, 0.05, random.Random(0)).regime is None
    for seed in range(6):
        regime = calibrated(LLAMA_ON_H200, 64, 0.05, random.Random(seed)).regime
        assert regime is not None and 64 <= regime.knee <= 512 and regime.full in (1024, 2048)


def test_units_and_windows_are_bounded_by_seconds_not_by_tiles(trace: list[Arrival]) -> None:
    tiles: list[int] = []

    def policy(view, cost, plan_id):  # type: ignore[no-untyped-def]
        plan = decide(view, cost, plan_id)
        tiles.extend(unit.end - unit.first for unit in plan.units)
        return plan

    run(trace[:60], 0.3, policy)
    assert max(tiles) * SETUP.tile == SETUP.pass_tokens


def test_short_samples_are_packed_up_to_the_rows_that_fill_the_device() -> None:
    packed = alone_tokens_per_s(replace(SETUP, sample_tokens=256), 10.0)
    apart = alone_tokens_per_s(replace(SETUP, pass_tokens=256), 10.0)
    assert packed > 1.2 * apart


def test_windows_have_a_limit_of_their_own() -> None:
    largest: list[int] = []

    def policy(view, cost, plan_id):  # type: ignore[no-untyped-def]
        plan = decide(view, cost, plan_id)
        largest.append(plan.work.finetune)
        return plan

    World(replace(SETUP, max_window_rows=1024), [Arrival(5.0, 1, 1)], policy).run(5.0)
    assert max(largest) == 1024
