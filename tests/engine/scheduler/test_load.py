"""Saturation is the largest of three shares of the promise, and is blind to how much finetuning goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine import engine as engine_module
from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork
from coserve_engine.messages import AddRequest, LoadReport, SamplingParams
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.load import Demand, RequestLoad, ServingTime, alone, saturation_percent

NOTHING = Demand((), (), (), 0.0, 0, 100)


class Linear(CostModel):
    """A millisecond a row, and `fixed_s` a forward; calls, keys and pairs are free."""

    def __init__(self, fixed_s: float = 0.0) -> None:
        super().__init__()
        self._fixed_s = fixed_s

    def forward_s(self, work: ForwardWork) -> float:
        return self._fixed_s + 1e-3 * work.rows


def percent(demand: Demand, fixed_s: float = 0.0) -> float:
    return saturation_percent(demand, Linear(fixed_s), ttft_s=1.0, tpot_s=0.2, tile=64)


def test_no_demand_is_zero() -> None:
    assert percent(NOTHING) == 0.0


def test_decoding_against_the_time_per_output_token() -> None:
    assert percent(replace(NOTHING, contexts=(100,) * 50)) == pytest.approx(25.0)


def test_waiting_and_prefill_against_the_time_to_first_token() -> None:
    """The second prompt waits for the first: (0.1 + 0.3 + 0.2) / 1."""
    assert percent(replace(NOTHING, prompts=(300, 200), waits_s=(0.1, 0.1))) == pytest.approx(60.0)
    assert percent(replace(NOTHING, prompts=(300, 200), waits_s=(0.5, 0.0))) == pytest.approx(80.0)


def test_pages_held_against_the_pool() -> None:
    assert percent(replace(NOTHING, held_pages=40)) == pytest.approx(40.0)


def test_the_largest_of_the_three() -> None:
    demand = Demand((100,) * 50, (300, 200), (0.1, 0.1), 0.0, 40, 100)
    assert percent(demand) == pytest.approx(60.0)
    assert percent(replace(demand, held_pages=90)) == pytest.approx(90.0)
    assert percent(replace(demand, contexts=(100,) * 150)) == pytest.approx(75.0)


@pytest.mark.parametrize("share", (0.0, 0.25, 0.5, 0.75))
@pytest.mark.parametrize("rate", (20.0, 60.0, 300.0))
def test_finetuning_in_the_slack_changes_nothing(share: float, rate: float) -> None:
    """`rate` tokens a second: by Little's law n = rate * T(n) / (1 - s) decode at once, where T(n) = 20 ms + 1 ms n."""

    def here(part: float) -> float:
        return rate * 0.02 / (1 - part - rate * 1e-3)

    if share + rate * 1e-3 >= 1 or here(0.0) < 1:
        return
    fixed_s, rows_s = 0.02, 1e-3 * here(share)
    assert alone(1, fixed_s, 1e-3, 0.0) == 1
    scaled = here(share) * fixed_s * (1 - share) / (fixed_s + share * rows_s)
    assert scaled == pytest.approx(here(0.0))


def test_a_model_that_foresees_no_time_takes_no_request_away() -> None:
    """Rows and the rest of an iteration may both be fitted to 0."""
    assert alone(3, 0.0, 0.0, 0.5) == 3


@given(count=st.integers(0, 100), fixed_s=st.floats(0, 0.1), row_s=st.floats(1e-5, 0.01), share=st.floats(0, 1))
def test_alone_is_the_fixed_point(count: int, fixed_s: float, row_s: float, share: float) -> None:
    found = alone(count, fixed_s, count * row_s, share)
    assert 0 <= found <= count
    if count and share:
        many, few = fixed_s + row_s * count, fixed_s + row_s * max(1.0, found)
        assert found == pytest.approx(min(count * (1 - share) * few / many, count), abs=1e-9) or found == 1.0


def test_fewer_are_also_faster() -> None:
    """The control: without T(n') / T(n) a share of a half would only halve the requests."""
    assert alone(60, 0.02, 0.06, 0.5) == pytest.approx(60 * 0.5 * 0.02 / (0.02 + 0.03))
    assert alone(60, 0.02, 0.06, 0.5) < 0.9 * 30


def test_the_share_matters() -> None:
    """The control: without taking finetuning out, the same requests look heavier."""
    stretched = Demand((100,) * 120, (), (), 0.5, 60, 100)
    assert percent(stretched, 0.02) < 0.5 * percent(replace(stretched, finetune_share=0.0), 0.02)


def test_the_share_is_of_the_time_between_tokens() -> None:
    """What is done while nobody is here makes nobody stay, and prompts take their time with or without finetuning."""
    time = ServingTime()
    time.add(1.0, 0.0, 1.0, busy=False)
    assert (time.share, time.finetune_s) == (0.0, 1.0)
    time.add(0.3, 0.4, 1.0, busy=True)
    assert time.share == pytest.approx(0.5)
    for _ in range(20):
        time.add(0.0, 0.0, 1.0, busy=True)
    assert time.share < 0.02


def test_who_was_put_out_still_asks_for_its_row_and_for_what_it_computes_again() -> None:
    """One that decodes, one that was put out, and a prompt that came 0.3 s ago, 0.1 s of them given to finetuning."""
    time = ServingTime(finetune_s=0.6)
    decoding = RequestLoad(99, 100, first=False, arrival_s=0.0, finetune_s=0.0)
    put_out = RequestLoad(0, 301, first=False, arrival_s=1.0, finetune_s=0.0)
    fresh = RequestLoad(0, 200, first=True, arrival_s=4.7, finetune_s=0.5)
    demand = Demand.of((decoding, put_out, fresh), 5.0, time, 40, 100)
    assert demand == Demand((99, 300), (301, 200), (0.0, pytest.approx(0.2)), 0.0, 40, 100)
    assert percent(demand) == pytest.approx(100 * (0.2 + 0.301 + 0.2)), "the prompt also waits for it"


# ---- the engine's reports ----


def test_reports_count_who_was_put_out(driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests that outgrow 19 pages of 16 tokens: all ask for a row from their first token to their last."""
    d = driver(kv_cache_bytes=20 * 8192, max_model_length=256, numerics=Numerics(page=16), jitter_s=1e-3)
    d.submit(*(AddRequest(f"r{n}", draw_tokens(n, 30), SamplingParams(60, ignore_eos=True), 0.0) for n in range(6)))
    table, put_out = d.engine.requests, 0

    def spy(demand: Demand, *others: Any) -> float:
        nonlocal put_out
        begun = [r for r in (*table.running.values(), *table.waiting) if r.last_emit_s is not None]
        assert demand.contexts == tuple(len(r.tokens) - 1 for r in begun)
        put_out += sum(r.last_emit_s is not None for r in table.waiting)
        return saturation_percent(demand, *others)

    monkeypatch.setattr(engine_module, "saturation_percent", spy)
    monkeypatch.setattr(engine_module, "LOAD_REPORT_S", 0.0)
    d.run()
    assert table.preemptions > 0 and put_out > 0 and not d.failures


def timed(d: Any, monkeypatch: pytest.MonkeyPatch, row_s: float = 5e-4, unit_s: float = 2e-3) -> None:
    """Let the fake clock advance as if each forward, row and unit took its time."""
    executor = d.engine.executor
    forward, backward = executor.forward, executor.backward

    def slow_forward(segments: Any, *rest: Any) -> Any:
        d.clock.now += 0.01 + row_s * sum(segment.length for segment in segments)
        return forward(segments, *rest)

    def slow_backward(unit: Any) -> None:
        d.clock.now += unit_s * (unit.end - unit.first)
        backward(unit)

    monkeypatch.setattr(executor, "forward", slow_forward)
    monkeypatch.setattr(executor, "backward", slow_backward)


def mean_saturation(d: Any, draw_tokens: Any, seconds: float = 20.0) -> float:
    """Four requests a second of 60 tokens each; the mean of the reports after the first seconds."""
    start, n = d.clock.now, 0
    while d.clock.now < start + seconds:
        while n < 4 * (d.clock.now - start):
            params = SamplingParams(60, ignore_eos=True)
            d.submit(AddRequest(f"r{n}", draw_tokens(n, 30), params, start + n / 4))
            n += 1
        before = d.clock.now
        d.step()
        if d.clock.now == before:
            d.clock.now += 0.01
    reports = [r.saturation_percent for r in d.of(LoadReport) if r.at_s > start + 5]
    assert len(reports) > 40
    return sum(reports) / len(reports)


def test_reports_leave_a_job_in_the_slack_out(
    driver: Any, draw_tokens: Any, training: Any, start_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, both = driver(), driver()
    for d in (alone, both):
        timed(d, monkeypatch)
    without = mean_saturation(alone, draw_tokens)
    counted: list[float] = []

    def spy(demand: Demand, *others: Any) -> float:
        counted.append(saturation_percent(replace(demand, finetune_share=0.0), *others))
        return saturation_percent(demand, *others)

    monkeypatch.setattr(engine_module, "saturation_percent", spy)
    both.submit(start_job(), *training(steps=150, micros=2))
    with_job = mean_saturation(both, draw_tokens)
    assert not both.engine.jobs["job"].idle
    assert both.engine._runner.accounts.time.finetune_s > 10.0, "finetuning took a share of the time"
    assert sum(counted) / len(counted) > without + 20.0, "counted as demand, it would bring a new replica"
    assert abs(with_job - without) < 7.0
