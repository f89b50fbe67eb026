"""Attainment is strict: a request's first token and the P99 of its gaps, refused ones missed, a window of a minute."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_agent.telemetry.passage import Cause, Passage, PathLog, RequestPath
from coserve_agent.telemetry.slo import Listener, LoadAverage, Slo, SloMeter, percentile
from coserve_engine.messages import Emission


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
    request.token(passed(at_s))
    for gap_s in gaps_s:
        at_s += gap_s
        request.token(passed(at_s))
    request.finish()


def passed(emitted_s: float, **emission: Any) -> Passage:
    """A token that came to the agent's loop a millisecond after the engine had it."""
    how = {"late_s": -0.01, "paused_s": 0.0, "finetuned": False, "prefilled": False, **emission}
    return Passage(emitted_s, emitted_s + 0.5e-3, emitted_s + 1e-3, Emission(**how))


class Heard(Listener):
    def __init__(self) -> None:
        self.lates: list[Cause] = []
        self.misses: list[Cause] = []
        self.excesses: list[float | None] = []
        self.judgements: list[bool] = []

    def gap(self, at_s: float, gap_s: float, excess_s: float | None) -> None:
        self.excesses.append(excess_s)

    def late(self, cause: Cause, by_s: float) -> None:
        assert by_s > 0
        self.lates.append(cause)

    def missed(self, cause: Cause) -> None:
        self.misses.append(cause)

    def judged(self, life_s: float, *, missed: bool) -> None:
        self.judgements.append(missed)


@pytest.fixture
def heard(meter: SloMeter) -> Heard:
    meter.listener = Heard()
    return meter.listener


class Stream:
    """A streamed answer: tokens come from the engine, and each is written some time after it came."""

    def __init__(self, meter: SloMeter, clock: Clock) -> None:
        self.clock, self.request, self.tokens = clock, meter.request(clock.now_s, streams=True), 0
        self.emitted_s = clock.now_s

    def token(self, after_s: float, *, on_the_way_s: float = 0.0, blocked_s: float = 0.0, **emission: Any) -> None:
        self.emitted_s += after_s
        self.request.token(passed(self.emitted_s, **emission))
        self.clock.now_s = max(self.clock.now_s, self.emitted_s + 1e-3 + on_the_way_s)
        self.request.writing()
        self.clock.now_s += blocked_s
        self.tokens += 1
        self.request.written(self.tokens)


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


def test_a_mistake_of_the_client_counts_for_nothing(meter: SloMeter, clock: Clock) -> None:
    wrong = meter.request(clock.now_s - 2.0)
    wrong.void()
    wrong.fail()
    assert meter.report().requests == 0


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


# ---- streams are judged where they are handed over, and each miss has a cause ----


@pytest.mark.parametrize(
    ("late", "cause"),
    [
        ({"after_s": 0.3, "late_s": 0.12}, Cause.OVER_BOUND),
        ({"after_s": 0.3, "late_s": 0.12, "paused_s": 0.15}, Cause.PAUSED),
        ({"after_s": 0.3, "late_s": 0.12, "paused_s": 0.05}, Cause.OVER_BOUND),
        ({"after_s": 0.3, "late_s": -0.05, "prefilled": True}, Cause.PREFILL),
        ({"after_s": 0.3, "late_s": -0.05}, Cause.WAITED),
        ({"after_s": 0.15, "on_the_way_s": 0.1}, Cause.DELIVERY),
    ],
)
def test_a_late_gap_has_its_cause(
    meter: SloMeter, clock: Clock, heard: Heard, late: dict[str, Any], cause: Cause
) -> None:
    stream = Stream(meter, clock)
    stream.token(0.1)
    stream.token(**late)
    stream.request.finish()
    assert heard.lates == heard.misses == [cause]
    assert meter.report().attainment_percent == 0
    assert meter.paths.since(0.0)[0]["cause"] == cause


@pytest.mark.parametrize(
    ("placed_after_s", "token", "cause"),
    [
        (1.0, {"after_s": 1.3}, Cause.WAITED),
        (0.1, {"after_s": 1.3}, Cause.PREFILL),
        (0.1, {"after_s": 1.3, "paused_s": 0.4}, Cause.PAUSED),
        (0.1, {"after_s": 0.8, "on_the_way_s": 0.4}, Cause.DELIVERY),
    ],
)
def test_a_late_first_token_has_its_cause(
    meter: SloMeter, clock: Clock, heard: Heard, placed_after_s: float, token: dict[str, Any], cause: Cause
) -> None:
    stream = Stream(meter, clock)
    placed_s = clock.now_s + placed_after_s
    stream.request.placed_s = lambda: placed_s
    stream.token(**token)
    stream.request.finish()
    assert heard.misses == [cause]


def test_what_the_client_does_not_read_is_left_out(meter: SloMeter, clock: Clock, heard: Heard) -> None:
    """Its second token is written 5 s late, for the client did not read; the third came meanwhile."""
    stream = Stream(meter, clock)
    stream.token(0.1)
    stream.token(0.1, blocked_s=5.0)
    stream.token(0.1)
    stream.request.finish()
    assert meter.report().attainment_percent == 100
    assert heard.lates == heard.misses == [Cause.CLIENT]
    assert heard.judgements == [False]


def test_the_same_delay_without_back_pressure_is_a_miss(meter: SloMeter, clock: Clock, heard: Heard) -> None:
    stream = Stream(meter, clock)
    stream.token(0.1)
    stream.token(0.1, on_the_way_s=5.0)
    stream.request.finish()
    assert (meter.report().attainment_percent, heard.misses) == (0, [Cause.DELIVERY])


def test_the_reserve_hears_of_gaps_with_finetuning_only(meter: SloMeter, clock: Clock, heard: Heard) -> None:
    stream = Stream(meter, clock)
    stream.token(0.1)
    stream.token(0.3, late_s=0.15)
    stream.token(0.3, late_s=0.15, finetuned=True)
    stream.token(0.1, late_s=-0.05, finetuned=True, on_the_way_s=0.07)
    stream.request.finish()
    assert heard.excesses == [None, pytest.approx(0.15), pytest.approx(0.02)]
    assert heard.judgements == [True]


def test_a_miss_without_finetuning_teaches_nothing(meter: SloMeter, clock: Clock, heard: Heard) -> None:
    stream = Stream(meter, clock)
    stream.token(0.1)
    stream.token(0.3, late_s=0.15)
    stream.request.finish()
    assert (heard.judgements, heard.misses) == ([], [Cause.OVER_BOUND])


def test_a_choice_is_not_charged_with_what_the_client_of_another_did_not_read(
    meter: SloMeter, clock: Clock, heard: Heard
) -> None:
    """Both choices have a token at once; while the first is written the client does not read for half a second."""
    first, second = (meter.request(clock.now_s, streams=True) for _ in range(2))
    for number, at_s in enumerate((0.1, 0.2), start=1):
        for choice in (first, second):
            choice.token(passed(1000.0 + at_s, finetuned=True))
        clock.now_s = max(clock.now_s, 1000.0 + at_s + 0.001)
        first.writing()
        clock.now_s += 0.5 * (number == 2)
        if first.written(number):
            second.blocked(first.blocked_until_s)
        second.writing()
        second.written(number)
    first.finish()
    second.finish()
    assert heard.lates == heard.misses == [Cause.CLIENT, Cause.CLIENT]
    assert heard.excesses == [pytest.approx(-0.01)] * 2


def test_a_miss_by_queueing_teaches_nothing_though_a_gap_that_may_be_late_had_finetuning(
    meter: SloMeter, clock: Clock, heard: Heard
) -> None:
    stream = Stream(meter, clock)
    stream.token(5.0)
    for _ in range(198):
        stream.token(0.1)
    stream.token(0.25, late_s=0.06, finetuned=True)
    stream.request.finish()
    assert (heard.judgements, heard.misses) == ([], [Cause.PREFILL])


def test_an_answer_that_is_no_stream_knows_no_client(meter: SloMeter, clock: Clock, heard: Heard) -> None:
    request = meter.request(clock.now_s)
    request.token(passed(clock.now_s + 0.1))
    request.token(passed(clock.now_s + 0.2)._replace(routed_s=clock.now_s + 0.9))
    request.finish()
    assert heard.lates == heard.misses == []


def test_a_request_that_was_turned_away_waited(meter: SloMeter, heard: Heard) -> None:
    meter.refused()
    assert heard.misses == [Cause.WAITED]


def test_paths_are_bounded_by_their_tokens() -> None:
    log = PathLog(tokens=10)
    for number in range(5):
        log.add(RequestPath(str(number), float(number), None, ((0.0, 0.0, 0.0, 0.0),) * 4))
    assert [path["id"] for path in log.since(-1.0)] == ["3", "4"]


def test_where_each_token_waited_is_shown(meter: SloMeter, clock: Clock) -> None:
    stream = Stream(meter, clock)
    began_s = clock.now_s
    stream.token(0.1, on_the_way_s=0.004)
    stream.request.finish()
    (path,) = meter.paths.since(0.0)
    assert path["tokens"] == (pytest.approx([began_s + after for after in (0.1, 0.1005, 0.101, 0.105)]),)
    assert meter.paths.since(began_s) == []


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
