"""Why promises were missed: what agents say of their side, and what only the client saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from demo.replay import Sample, Slo
from demo.watch import AgentLog

PAUSE_S = 0.02
"""Shorter pauses are not worth a word."""
MACHINES = {"paused", "client stood still"}
"""Causes that lie with this machine."""


@dataclass(frozen=True)
class Misses:
    """Requests that missed their promise, by cause."""

    total: int
    by_cause: Counter[str]

    @property
    def only_the_machines(self) -> bool:
        """Whether nothing but pauses of this machine made requests miss."""
        return bool(self.by_cause) and set(self.by_cause) <= MACHINES

    def lines(self) -> list[str]:
        said = ", ".join(f"{cause} {count}" for cause, count in self.by_cause.most_common())
        return [f"missed promises: {sum(self.by_cause.values())} of {self.total}{': ' if said else ''}{said}"]


def misses(
    samples: Sequence[Sample], slo: Slo, paths: Iterable[dict[str, Any]], stalls: Sequence[tuple[float, float]]
) -> Misses:
    """Match what the client saw with `paths`, the agents' /debug/requests."""
    causes = {path["id"].rsplit("-", 1)[0]: path["cause"] for path in paths}
    found: Counter[str] = Counter()
    for sample in samples:
        if slo.attained(sample):
            continue
        known = causes.get(sample.name.removeprefix("cmpl-"), "unknown: the agent has no record of it")
        if sample.error is not None:
            found["failed"] += 1
        elif known is not None:
            found[known] += 1
        else:  # in time where the agent handed it over
            found["client stood still" if _stalled(sample, slo, stalls) else "on the way to the client"] += 1
    return Misses(len(samples), found)


def _stalled(sample: Sample, slo: Slo, stalls: Sequence[tuple[float, float]]) -> bool:
    """Whether the client stood still in each late gap, or before a late first token."""
    times = [sample.due_s, *sample.token_times_s]
    limits = [slo.ttft_s, *(slo.tpot_s for _ in sample.gaps_s)]
    late = [
        (began_s, ended_s)
        for began_s, ended_s, limit_s in zip(times, times[1:], limits, strict=False)
        if ended_s - began_s > limit_s
    ]
    return all(
        any(stall_began_s < ended_s and stall_ended_s > began_s for stall_began_s, stall_ended_s in stalls)
        for began_s, ended_s in late
    )


def pauses_said(logs: Sequence[AgentLog], since_s: float, stalls: Sequence[tuple[float, float]]) -> str:
    """How much this machine paused the agents' engines and the client since then."""
    rows = [row["paused"] for log in logs for row in log.iterations if row["started"] >= since_s]
    spans_s = sum(row["duration"] for log in logs for row in log.iterations if row["started"] >= since_s)
    long = [seconds for seconds in rows if seconds >= PAUSE_S]
    still_ms = 1e3 * max((ended_s - began_s for began_s, ended_s in stalls), default=0.0)
    return (
        f"pauses of the machine: {len(long)} of over {1e3 * PAUSE_S:.0f} ms in the engines, the longest "
        f"{1e3 * max(rows, default=0.0):.0f} ms, {100 * sum(rows) / max(spans_s, 1e-9):.1f} % of their time; "
        f"the client stood still {len(stalls)} times, {still_ms:.0f} ms at most"
    )
