"""Saturation is the largest of three shares of the promise, and is blind to how much finetuning goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coserve_engine import engine as engine_module
from coserve_engine.cost import CostModel, ForwardWork
from coserve_engine.load import Demand, saturation_percent
from coserve_engine.messages import AddRequest, LoadReport, SamplingParams

NOTHING = Demand((), (), (), 0.0, 0, 100)


class Linear(CostModel):
    """A millisecond a row; calls, keys and pairs are free."""

    def forward_s(self, work: ForwardWork) -> float:
        return 1e-3 * (work.decode + work.prefill + work.finetune)


def percent(demand: Demand) -> float:
    return saturation_percent(demand, Linear(), ttft_s=1.0, tpot_s=0.2, tile=64)


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
def test_finetuning_in_the_slack_changes_nothing(share: float) -> None:
    """By Little's law a share s of time for finetuning makes requests stay, and pages be held, 1 / (1 - s) as long."""
    alone = Demand((100,) * 60, (), (), 0.0, 24, 1000)
    stretched = Demand((100,) * round(60 / (1 - share)), (), (), share, round(24 / (1 - share)), 1000)
    assert percent(stretched) == pytest.approx(percent(alone))
    pages = replace(NOTHING, held_pages=30)
    assert percent(replace(pages, finetune_share=share, held_pages=round(30 / (1 - share)))) == pytest.approx(
        percent(pages)
    )


def test_the_share_matters() -> None:
    """The control: without taking finetuning out, the same requests look heavier."""
    stretched = Demand((100,) * 120, (), (), 0.5, 0, 100)
    assert percent(stretched) == pytest.approx(percent(replace(stretched, finetune_share=0.0)) / 2)


# ---- the engine's reports ----


def timed(d: Any, monkeypatch: pytest.MonkeyPatch, row_s: float = 5e-4, unit_s: float = 2e-3) -> None:
    """Let the fake clock advance as if each forward, row and unit took its time."""
    executor = d.engine.executor
    forward, backward = executor.forward, executor.backward

    def slow_forward(segments: Any, sequences: Any) -> Any:
        d.clock.now += 0.01 + row_s * sum(segment.length for segment in segments)
        return forward(segments, sequences)

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
    """Little's law takes most of it out; not all, since larger batches are also more efficient."""
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
    assert both.engine._finetune.total_s > 10.0, "finetuning took a share of the time"
    assert sum(counted) / len(counted) > without + 25.0, "counted as demand, it would bring a new replica"
    assert abs(with_job - without) < 10.0
