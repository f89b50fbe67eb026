"""Did each request get what was promised? Strictly: its first token in time and the P99 of its gaps in time.

Mean time per token would hide the stalls that users see, so it decides nothing here. Requests that were refused
count as missed. A stream is judged from the request's arrival to when its tokens are handed to the transport, but for
time in which the client did not read; an answer that is no stream by the engine's times.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from coserve_agent.telemetry.passage import Cause, Passage, PathLog, RequestPath, cause_of_first, cause_of_gap
from coserve_agent.telemetry.timing import timing

WINDOW_S = 60.0
LOAD_WINDOW_S = 15.0
BACK_PRESSURE_S = 0.01
"""A write that takes longer waited for the client to read; a shorter one may have waited for a core."""


@dataclass(frozen=True, slots=True)
class Slo:
    """The promise, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class SloReport:
    """The last minute: P99 of first-token times and of all gaps in ms, and the share of requests that attained in
    percent.

    None where nothing was measured: no data is not a kept promise.
    """

    ttft_p99_ms: int | None
    tpot_p99_ms: int | None
    attainment_percent: float | None
    requests: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged request; a refused one has no times."""

    at_s: float
    attained: bool
    ttft_s: float | None
    gaps_p99_s: float | None


class Listener:
    """Hears what is measured, times in seconds."""

    def first_token(self, ttft_s: float) -> None:
        """A request got its first token."""

    def gap(self, at_s: float, gap_s: float, excess_s: float | None) -> None:
        """Between two tokens of a request; `excess_s`: how much later than planned (None: without finetuning)."""

    def late(self, cause: Cause, by_s: float) -> None:
        """A first token or a gap was later than promised."""

    def missed(self, cause: Cause) -> None:
        """A request missed its promise by being late or turned away; with Cause.CLIENT: it kept it, but would not have
        if its client's own delays counted.
        """

    def judged(self, life_s: float, *, missed: bool) -> None:
        """A request kept its promise, or missed it by gaps with finetuning alone."""


class RequestMeter:
    """Times of one request. `late` gaps decide: the P99 is over the promise iff more than one in a hundred is."""

    def __init__(self, owner: SloMeter, arrival_s: float, name: str, *, streams: bool) -> None:
        self._owner, self._arrival_s, self._name, self._streams = owner, arrival_s, name, streams
        self._paused_s = owner.paused_s
        self._passages: list[Passage] = []
        self._handed_s: list[float] = []
        self._last_s = arrival_s
        """When the last one counts as handed over."""
        self._gaps_s: list[float] = []
        self._late = 0
        self._late_with_clients = 0
        """Late gaps, those included that the client's own delays made."""
        self._late_with_finetuning = 0
        self._worst: tuple[float, Cause] | None = None
        """By how much and why: the first token if that was late, else the latest gap."""
        self._writing_s = 0.0
        self.blocked_until_s = -math.inf
        self._ttft_s: float | None = None
        self._judged = False
        self.placed_s: Callable[[], float] = lambda: arrival_s
        """When the request got its place; known once its prompt is done."""

    def token(self, passage: Passage) -> None:
        """A token came from the engine."""
        self._passages.append(passage)
        if not self._streams:
            self._hand(passage.routed_s, passage.emitted_s)

    def timing(self, tokens: int) -> dict[str, float | None]:
        """The times of the request and of its first `tokens`."""
        return timing(self._arrival_s, self.placed_s(), [one.emitted_s for one in self._passages[:tokens]])

    def writing(self) -> None:
        """The next piece of the stream is handed to the transport."""
        self._writing_s = self._owner.now_s()

    def written(self, tokens: int) -> bool:
        """With that, so many tokens of this request are. Returns whether the client kept it waiting."""
        now_s = self._owner.now_s()
        waited = now_s - self._writing_s > BACK_PRESSURE_S
        if waited:
            self.blocked(now_s)
        for passage in self._passages[len(self._handed_s) : tokens]:
            blocked = passage.routed_s < self.blocked_until_s
            self._hand(now_s, passage.routed_s if blocked else now_s)
        return waited

    def blocked(self, until_s: float) -> None:
        """The client of this answer did not read until then."""
        self.blocked_until_s = until_s

    def _hand(self, handed_s: float, judged_s: float) -> None:
        number, slo, listener = len(self._handed_s), self._owner.slo, self._owner.listener
        passage, last_s, self._last_s = self._passages[number], self._last_s, judged_s
        self._handed_s.append(handed_s)
        if number == 0:
            self._ttft_s = judged_s - self._arrival_s
            listener.first_token(self._ttft_s)
            if self._ttft_s > slo.ttft_s:
                cause = cause_of_first(passage, self._arrival_s, self.placed_s(), self._paused_s, slo.ttft_s)
                self._worst = math.inf, cause
                listener.late(cause, self._ttft_s - slo.ttft_s)
            return
        before, gap_s = self._passages[number - 1], judged_s - last_s
        emission = passage.emission
        excess_s = emission.late_s + gap_s - (passage.emitted_s - before.emitted_s) if emission.finetuned else None
        self._gaps_s.append(gap_s)
        listener.gap(judged_s, gap_s, excess_s)
        late_s = gap_s - slo.tpot_s
        if late_s > 0:
            self._late += 1
            self._late_with_finetuning += emission.finetuned
            cause = cause_of_gap(before, passage, gap_s, slo.tpot_s)
            if self._worst is None or late_s > self._worst[0]:
                self._worst = late_s, cause
            listener.late(cause, late_s)
        elif self._streams and handed_s - self._handed_s[-2] > slo.tpot_s:
            listener.late(Cause.CLIENT, handed_s - self._handed_s[-2] - slo.tpot_s)
            self._late_with_clients += 1

    def attained(self, now_s: float) -> bool:
        """Whether the promise is kept so far, at `now_s` if no token came yet."""
        ttft_s = now_s - self._arrival_s if self._ttft_s is None else self._ttft_s
        return ttft_s <= self._owner.slo.ttft_s and self._late <= len(self._gaps_s) // 100

    def finish(self) -> None:
        """The request got all it asked for."""
        self._judge(self.attained(self._owner.now_s()))

    def cancel(self) -> None:
        """The client left: counted only if the promise was broken by then, for that may be why it left."""
        if not self.attained(self._owner.now_s()):
            self._judge(False)
        self._judged = True

    def void(self) -> None:
        """The client's mistake: nothing was promised."""
        self._judged = True

    def fail(self) -> None:
        """Refused, or broken off by the server."""
        self._judge(False)

    def _judge(self, attained: bool) -> None:
        if self._judged:
            return
        self._judged = True
        owner, now_s = self._owner, self._owner.now_s()
        p99_s = percentile(self._gaps_s, 99) if self._gaps_s else None
        cause, bears = None, len(self._gaps_s) // 100
        if not attained:
            late = self._worst is not None or now_s - self._arrival_s > owner.slo.ttft_s
            cause = (self._worst[1] if self._worst is not None else Cause.WAITED) if late else None
        if cause is not None:
            owner.listener.missed(cause)
        elif attained and self._late + self._late_with_clients > bears:
            owner.listener.missed(Cause.CLIENT)
        in_time = self._ttft_s is not None and self._ttft_s <= owner.slo.ttft_s
        if attained or (in_time and self._late_with_finetuning > bears):
            owner.listener.judged(now_s - self._arrival_s, missed=not attained)
        times = tuple(
            (p.emitted_s, p.received_s, p.routed_s, handed_s)
            for p, handed_s in zip(self._passages, self._handed_s, strict=False)
        )
        owner.paths.add(RequestPath(self._name, self._arrival_s, cause, times))
        owner.record(Sample(now_s, attained, self._ttft_s, p99_s))


class SloMeter:
    """Attainment over the last minute. `listener` hears every time and what came of it."""

    def __init__(self, slo: Slo, now_s: Callable[[], float], listener: Listener | None = None) -> None:
        self.slo = slo
        self.now_s = now_s
        self.listener = listener or Listener()
        self.paths = PathLog()
        self.paused_s = 0.0
        """The machine's pauses since the engine's start, as far as is known."""
        self._samples: deque[Sample] = deque()

    def request(self, arrival_s: float, name: str = "", *, streams: bool = False) -> RequestMeter:
        return RequestMeter(self, arrival_s, name, streams=streams)

    def refused(self) -> None:
        """A request that was turned away before it began."""
        self.listener.missed(Cause.WAITED)
        self.record(Sample(self.now_s(), False, None, None))

    def record(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._trim()

    def report(self) -> SloReport:
        self._trim()
        count = len(self._samples)
        ttfts = [sample.ttft_s for sample in self._samples if sample.ttft_s is not None]
        gaps = [sample.gaps_p99_s for sample in self._samples if sample.gaps_p99_s is not None]
        attained = sum(sample.attained for sample in self._samples)
        return SloReport(
            ttft_p99_ms=round(percentile(ttfts, 99) * 1000) if ttfts else None,
            tpot_p99_ms=round(percentile(gaps, 99) * 1000) if gaps else None,
            attainment_percent=100.0 * attained / count if count else None,
            requests=count,
        )

    def _trim(self) -> None:
        horizon_s = self.now_s() - WINDOW_S
        while self._samples and self._samples[0].at_s < horizon_s:
            self._samples.popleft()


class LoadAverage:
    """Saturation averaged over the last 15 s, each report weighted by how long it was the newest."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._times: list[float] = []
        self._values: list[float] = []

    def add(self, at_s: float, percent: float) -> None:
        if not math.isfinite(percent) or (self._times and at_s < self._times[-1]):
            return
        self._times.append(at_s)
        self._values.append(percent)
        # Keep one from before the window: it holds at the window's beginning.
        old = bisect_left(self._times, at_s - LOAD_WINDOW_S) - 1
        if old > 0:
            del self._times[:old], self._values[:old]

    def percent(self) -> float | None:
        """None before the first report."""
        if not self._times:
            return None
        end_s = max(self._now_s(), self._times[-1])
        begin_s = end_s - LOAD_WINDOW_S
        total = weight = 0.0
        for n, value in enumerate(self._values):
            until_s = self._times[n + 1] if n + 1 < len(self._times) else end_s
            held_s = until_s - max(self._times[n], begin_s)
            if held_s > 0:
                total += value * held_s
                weight += held_s
        return total / weight if weight else self._values[-1]


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank: the smallest value that at least `percent` of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]
