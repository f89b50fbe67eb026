"""Attainment is strict: a request's first token and the P99 of its gaps, refused ones missed, a window of a minute."""

from __future__ import annotations

import pytest

from coserve_agent.slo import LoadAverage, Slo, SloMeter, percentile


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> SloMeter:
    return SloMeter(Slo(ttft_s=1.0, tpot_s=0.2), clock)


def run(meter: SloMeter, clock: Clock, ttft_s: float, gaps_s: list[float]) -> None:
    request = meter.request(clock.now_s)
    at_s = clock.now_s + ttft_s
    request.token(at_s)
    for gap_s in gaps_s:
        at_s += gap_s
        request.token(at_s)
    request.finish()


@pytest.mark.parametrize(
    ("ttft_s", "gaps_s", "percent"),
    [
        (1.0, [0.1] * 9, 100),
        (1.1, [0.1] * 9, 0),
        (0.5, [0.1] * 98 + [0.3], 0),
        (0.5, [0.1] * 99 + [0.3], 100),
        (0.5, [0.1] * 198 + [0.3] * 2, 100),
        (0.5, [0.1] * 197 + [0.3] * 3, 0),
        (0.5, [], 100),
    ],
)
def test_a_request_attains_or_not(
    meter: SloMeter, clock: Clock, ttft_s: float, gaps_s: list[float], percent: float
) -> None:
    run(meter, clock, ttft_s, gaps_s)
    assert meter.report().attainment_percent == percent


def test_a_mean_within_the_promise_does_not_hide_a_stall(meter: SloMeter, clock: Clock) -> None:
    run(meter, clock, 0.1, [0.01] * 19 + [1.5])
    assert meter.report().attainment_percent == 0


def test_refused_and_failed_requests_are_missed(meter: SloMeter, clock: Clock) -> None:
    run(meter, clock, 0.1, [0.1])
    meter.refused()
    meter.request(clock.now_s).fail()
    report = meter.report()
    assert report.requests == 3
    assert report.attainment_percent == pytest.approx(100 / 3)


def test_a_client_that_leaves_counts_only_if_the_promise_was_broken(meter: SloMeter, clock: Clock) -> None:
    early, late = meter.request(clock.now_s), meter.request(clock.now_s - 2.0)
    early.cancel()
    late.cancel()
    assert (meter.report().requests, meter.report().attainment_percent) == (1, 0)


def test_the_window_is_a_minute_and_nothing_is_not_zero(meter: SloMeter, clock: Clock) -> None:
    assert meter.report().attainment_percent is None
    run(meter, clock, 0.25, [0.05, 0.1])
    report = meter.report()
    assert (report.ttft_p99_ms, report.tpot_p99_ms) == (250, 100)
    clock.now_s += 61
    assert meter.report().requests == 0
    assert meter.report().ttft_p99_ms is None


def test_saturation_is_averaged_over_time(clock: Clock) -> None:
    load = LoadAverage(clock)
    assert load.percent() is None
    load.add(clock.now_s, 100.0)
    clock.now_s += 5
    load.add(clock.now_s, 0.0)
    clock.now_s += 5
    assert load.percent() == pytest.approx(50)
    clock.now_s += 7.5
    assert load.percent() == pytest.approx(100 * 2.5 / 15)
    clock.now_s += 10
    assert load.percent() == pytest.approx(0)


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
    assert percentile([5.0], 99) == 5.0
