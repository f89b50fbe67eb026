"""Did each request get what was promised? Strictly: its first token in time and the P99 of its gaps in time.

Mean time per token would hide the stalls that users see, so it decides nothing here. Requests that were refused
count as missed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0
LOAD_WINDOW_S = 15.0


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


class RequestMeter:
    """Times of one request. `late` gaps decide: the P99 is over the promise iff more than one in a hundred is."""

    def __init__(self, owner: SloMeter, arrival_s: float) -> None:
        self._owner = owner
        self._arrival_s = arrival_s
        self._last_s: float | None = None
        self._gaps_s: list[float] = []
        self._ttft_s: float | None = None
        self._judged = False

    def token(self, emitted_s: float) -> None:
        if self._last_s is None:
            self._ttft_s = emitted_s - self._arrival_s
            self._owner.on_ttft(self._ttft_s)
        else:
            gap_s = emitted_s - self._last_s
            self._gaps_s.append(gap_s)
            self._owner.on_gap(gap_s)
        self._last_s = emitted_s

    def attained(self, now_s: float) -> bool:
        """Whether the promise is kept so far, at `now_s` if no token came yet."""
        slo = self._owner.slo
        ttft_s = now_s - self._arrival_s if self._ttft_s is None else self._ttft_s
        late = sum(gap_s > slo.tpot_s for gap_s in self._gaps_s)
        return ttft_s <= slo.ttft_s and late <= len(self._gaps_s) // 100

    def finish(self) -> None:
        """The request got all it asked for."""
        self._judge(self.attained(self._owner.now_s()))

    def cancel(self) -> None:
        """The client left: counted only if the promise was broken by then, for that may be why it left."""
        if not self.attained(self._owner.now_s()):
            self._judge(False)
        self._judged = True

    def fail(self) -> None:
        """Refused, or broken off by the server."""
        self._judge(False)

    def _judge(self, attained: bool) -> None:
        if self._judged:
            return
        self._judged = True
        p99_s = percentile(self._gaps_s, 99) if self._gaps_s else None
        self._owner.record(Sample(self._owner.now_s(), attained, self._ttft_s, p99_s))


class SloMeter:
    """Attainment over the last minute. `on_ttft` and `on_gap` hear every first-token time and gap, in seconds."""

    def __init__(
        self,
        slo: Slo,
        now_s: Callable[[], float],
        on_ttft: Callable[[float], None] = lambda seconds: None,
        on_gap: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.slo = slo
        self.now_s = now_s
        self.on_ttft = on_ttft
        self.on_gap = on_gap
        self._samples: deque[Sample] = deque()

    def request(self, arrival_s: float) -> RequestMeter:
        return RequestMeter(self, arrival_s)

    def refused(self) -> None:
        """A request that was turned away before it began."""
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
