"""Policies side by side on one trace, SLO and load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coserve_engine.latency.reserve import Reserve
from coserve_engine.latency.work import ForwardWork
from coserve_engine.simulate.bound import ATTAINED_PERCENT, part, work_conserving_bound
from coserve_engine.simulate.policies import policy_named
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate
from coserve_engine.simulate.world import World


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Percentages: attainment strict and by mean, finetuning of alone and of the bound, iterations over,
    mean error of predictions. `unit_wait_ms`: the longest that a request waited for units that were under way when it
    came, or enqueued. `simulated_s`: how long it was. `p99_tpot_ms` is of the requests' mean gaps, which hide stalls.
    """

    policy: str
    slo_ms: float
    load_percent: float
    strict: float
    by_mean: float
    finetuning: float
    of_bound: float
    median_gap_ms: float
    p99_gap_ms: float
    over: float
    error: float
    unit_wait_ms: float
    simulated_s: float
    p99_ttft_ms: float
    p99_tpot_ms: float


@dataclass(frozen=True, slots=True)
class Case:
    """An engine, its trace, `capacity` requests a second, and tokens a second of finetuning alone."""

    setup: Setup
    arrivals: tuple[Arrival, ...]
    capacity: float
    alone: float
    load_percent: float

    def run(self, name: str, max_slowdown: float | None = None) -> Row:
        """Run one policy."""
        setup = replace(self.setup, max_slowdown=max_slowdown)
        machine = setup.machine
        entry = policy_named(name, setup.tpot_s, lambda rows: machine.forward_s(ForwardWork(prefill=rows)))
        rate = self.capacity * self.load_percent / 100
        arrivals = at_rate(list(self.arrivals), rate)
        used = setup if entry.share is None else part(setup, entry.share)
        reserve = Reserve(setup.tpot_s, ATTAINED_PERCENT) if setup.pauses.per_s > 0 else None
        world = World(used, arrivals, entry.policy, finetuning=entry.finetuning, stops=entry.stops, reserve=reserve)
        result = world.run()
        got = 1.0 - entry.share if entry.share is not None else result.finetune_tokens_per_s / self.alone
        bound = work_conserving_bound(setup, arrivals, len(arrivals) / result.seconds)
        return Row(
            policy=name,
            slo_ms=1e3 * setup.tpot_s,
            load_percent=self.load_percent,
            strict=result.strict_percent,
            by_mean=result.mean_percent,
            finetuning=100 * got,
            of_bound=100 * got / bound if bound > 0 else float("nan"),
            median_gap_ms=result.gap_ms(50),
            p99_gap_ms=result.gap_ms(99),
            over=result.over_percent,
            error=result.error_percent,
            unit_wait_ms=1e3 * result.unit_wait_s,
            simulated_s=result.seconds,
            p99_ttft_ms=result.ttft_ms(99),
            p99_tpot_ms=result.tpot_ms(99),
        )


HEAD = (
    "SLO ms",
    "load %",
    "strict %",
    "mean %",
    "FT % alone",
    "% bound",
    "gap P50 ms",
    "gap P99 ms",
    "over %",
    "error %",
    "wait ms",
)


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text."""

    def line(r: Row) -> str:
        return (
            f"{r.policy:<20}{r.slo_ms:>11.0f}{r.load_percent:>11.0f}{r.strict:>11.2f}{r.by_mean:>11.2f}"
            f"{r.finetuning:>11.1f}{r.of_bound:>11.1f}{r.median_gap_ms:>11.1f}{r.p99_gap_ms:>11.1f}{r.over:>11.3f}"
            f"{r.error:>11.1f}{r.unit_wait_ms:>11.1f}"
        )

    return "\n".join([f"{'policy':<20}" + "".join(f"{name:>11}" for name in HEAD), *map(line, rows)])
