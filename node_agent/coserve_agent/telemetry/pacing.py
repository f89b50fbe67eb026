"""What is measured of promises, and what follows: metrics, and the reserve that the engine keeps."""

from __future__ import annotations

from collections.abc import Callable

from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.passage import Cause
from coserve_agent.telemetry.slo import Listener
from coserve_engine.latency.reserve import Reserve
from coserve_engine.messages import IterationDone, SetReserve

CHANGE_S = 5e-4
"""The engine hears of changes of the reserve that are larger."""


class Pacer(Listener):
    """The reserve of one engine; `submit` takes the command with which that is told."""

    def __init__(self, reserve: Reserve, metrics: Metrics, submit: Callable[[SetReserve], None]) -> None:
        self._reserve, self._metrics, self._submit = reserve, metrics, submit
        self._told_s = 0.0

    def tell(self) -> None:
        """Tell the engine, if there is news."""
        seconds = self._reserve.seconds
        if abs(seconds - self._told_s) > CHANGE_S:
            self._told_s = seconds
            self._metrics.reserve.set(seconds)
            self._submit(SetReserve(seconds))

    def iteration(self, event: IterationDone) -> None:
        if event.excess_s is not None:
            self._reserve.observe(event.started_s + event.duration_s, event.excess_s, event.paused_s)
            self.tell()

    def first_token(self, ttft_s: float) -> None:
        self._metrics.ttft.observe(ttft_s)

    def gap(self, at_s: float, gap_s: float, excess_s: float | None) -> None:
        self._metrics.gap.observe(gap_s)
        if excess_s is not None:
            self._reserve.observe(at_s, excess_s)

    def late(self, cause: Cause, by_s: float) -> None:
        self._metrics.late.labels(cause.value).observe(by_s)

    def missed(self, cause: Cause) -> None:
        self._metrics.missed.labels(cause.value).inc()

    def judged(self, life_s: float, *, missed: bool) -> None:
        self._reserve.judged(life_s, missed=missed)
