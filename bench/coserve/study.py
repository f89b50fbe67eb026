"""Every policy on the same requests: the sweep of each family, and the best setting that keeps the promise.

A run is paired with the others of its seed: they share the requests (a slice of the trace) and the machine's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from coserve.families import ALONE, FAMILIES, OURS, Family
from coserve.interval import Mean, mean
from coserve_engine.simulate.bound import capacity, work_conserving_bound
from coserve_engine.simulate.compare import Case, Row
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate
from coserve_engine.simulate.world import alone_tokens_per_s

POINTS = 1.0
"""Of strict attainment below serving alone, beyond which a policy is infeasible."""
NEAR_POINTS = 3.0
"""Below it in the sweep's one run, beyond which the other seeds are not tried."""
LONGEST_S, LEAST_REQUESTS = 600.0, 100
TRIED = 3
"""Settings of a family, best first, that all seeds are run for."""


def slices(arrivals: list[Arrival], count: int, requests: int) -> list[tuple[Arrival, ...]]:
    """`count` runs of `requests` neighbours, spread evenly over the trace, each from second 0."""
    last = max(0, len(arrivals) - requests)
    starts = [last * n // max(1, count - 1) for n in range(count)]
    return [
        tuple(a._replace(at_s=a.at_s - arrivals[start].at_s) for a in arrivals[start : start + requests])
        for start in starts
    ]


@dataclass(frozen=True, slots=True)
class Load:
    """An SLO and a load: `seeds` of the same case."""

    seeds: tuple[Case, ...]

    @property
    def slo_ms(self) -> float:
        return 1e3 * self.seeds[0].setup.tpot_s

    @property
    def percent(self) -> float:
        return self.seeds[0].load_percent

    @property
    def bound(self) -> float:
        """The work-conserving bound, in percent of finetuning alone."""
        first = self.seeds[0]
        rate = first.capacity * first.load_percent / 100
        arrivals = [a for case in self.seeds for a in case.arrivals]
        return 100 * work_conserving_bound(first.setup, arrivals, rate)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A family at one load: its best setting (None: none is feasible), and the rows of it and of ours, seed by seed."""

    family: Family
    setting: str | None
    rows: tuple[Row, ...] = ()

    @property
    def rate(self) -> Mean:
        """Finetuning in percent of alone; 0 where no setting is feasible."""
        return mean([row.finetuning for row in self.rows]) if self.rows else Mean(0.0, 0.0)


@dataclass
class Results:
    """Rows by (SLO, load, policy), one a seed as far as they were run."""

    loads: list[Load]
    rows: dict[tuple[float, float, str], list[Row]] = field(default_factory=dict)

    def of(self, load: Load, policy: str) -> list[Row]:
        return self.rows.get((load.slo_ms, load.percent, policy), [])

    def add(self, load: Load, policy: str, rows: list[Row]) -> None:
        """The rows of the next seeds."""
        self.rows.setdefault((load.slo_ms, load.percent, policy), []).extend(rows)

    def keeps(self, load: Load, policy: str, *, strict: bool = True) -> bool:
        """Whether the promise is kept on all seeds: by strict attainment, or by P99 TTFT and mean gaps."""
        rows = self.of(load, policy)
        if len(rows) < len(load.seeds):
            return False
        return deficit(self.of(load, ALONE), rows) <= POINTS if strict else held(load, rows)

    def best(self, load: Load, family: Family, *, strict: bool = True) -> Outcome:
        """The setting with the most finetuning among those that keep the promise by either measure."""
        kept = [name for name in family.settings if self.keeps(load, name, strict=strict)]
        found = [Outcome(family, name, tuple(self.of(load, name))) for name in kept]
        return max(found, key=lambda outcome: outcome.rate.value, default=Outcome(family, None))

    def best_other(self, load: Load, kinds: Iterable[str], *, strict: bool = True) -> Outcome:
        """The best of all families of these kinds."""
        found = [self.best(load, family, strict=strict) for family in FAMILIES if family.kind in kinds]
        return max(found, key=lambda outcome: outcome.rate.value)

    def steady(self, loads: list[Load], family: Family) -> str | None:
        """The setting that keeps the promise at all of these loads, on the seeds that were run, and gets most; None:
        none does.
        """
        alone = [self.of(load, ALONE) for load in loads]
        rates: dict[str, float] = {}
        for name in family.settings:
            rows = [self.of(load, name) for load in loads]
            if all(rows) and all(deficit(a, r) <= POINTS for a, r in zip(alone, rows, strict=True)):
                rates[name] = sum(mean([row.finetuning for row in r]).value for r in rows)
        return max(rates, key=rates.__getitem__, default=None)

    def ratio(self, load: Load, other: Outcome) -> Mean | None:
        """How many times as much finetuning ours gets as the other, paired by seed; None: the other gets nothing."""
        pairs = list(zip(self.of(load, OURS), other.rows, strict=False))
        if not pairs or any(row.finetuning <= 0 for _, row in pairs):
            return None
        return mean([ours.finetuning / row.finetuning for ours, row in pairs])


def loads_of(
    setups: list[Setup], arrivals: list[Arrival], percents: list[float], seeds: int, requests: int, pool: Executor
) -> list[Load]:
    """All loads of all SLOs. Load 100 % is the capacity of the whole trace. At low loads a slice has fewer requests, so
    that a run is not longer than LONGEST_S.
    """
    alone = list(pool.map(alone_tokens_per_s, setups))
    most = list(pool.map(capacity, setups, [arrivals] * len(setups)))
    for setup, requests_per_s in zip(setups, most, strict=True):
        if requests_per_s == 0:
            slo_ms = 1e3 * setup.tpot_s
            raise SimulationError(f"--slo-ms is {slo_ms:.0f}: serving alone never keeps it here; choose a longer one")
    parts = slices(arrivals, seeds, requests)
    return [
        Load(
            tuple(
                Case(
                    replace(setup, seed=seed),
                    part[: max(LEAST_REQUESTS, round(requests_per_s * percent / 100 * LONGEST_S))],
                    requests_per_s,
                    tokens_per_s,
                    percent,
                )
                for seed, part in enumerate(parts)
            )
        )
        for setup, requests_per_s, tokens_per_s in zip(setups, most, alone, strict=True)
        for percent in percents
    ]


def run_all(loads: list[Load], pool: Executor, *, thorough: bool) -> Results:
    """Ours and serving alone on all seeds, then what `explore` runs of each family at each load."""
    results = Results(loads)
    cases = [(load, name, case) for load in loads for name in (OURS, ALONE) for case in load.seeds]
    rows = pool.map(Case.run, [case for _, _, case in cases], [name for _, name, _ in cases])
    for (load, name, _), row in zip(cases, rows, strict=True):
        results.add(load, name, [row])
    jobs = [(load, family) for load in loads for family in FAMILIES]
    found = pool.map(
        explore,
        [load for load, _ in jobs],
        [family for _, family in jobs],
        [results.of(load, ALONE) for load, _ in jobs],
        [thorough] * len(jobs),
    )
    for (load, family), explored in zip(jobs, found, strict=True):
        for name, more in explored.items():
            results.add(load, name, more)
        if family is FAMILIES[-1]:
            print(f"  {load.slo_ms:.0f} ms, {load.percent:.0f} % load", flush=True)
    return results


def explore(
    load: Load, family: Family, alone: list[Row], thorough: bool, run: Callable[[Case, str], Row] = Case.run
) -> dict[str, list[Row]]:
    """The settings of a family on one seed, from mild to rough, until two in a row are far from the promise by either
    measure (`thorough`: all); then the other seeds for those that get most, until one keeps the promise on all.
    """
    found: dict[str, list[Row]] = {}
    far = 0
    for name in family.settings:
        found[name] = [run(load.seeds[0], name)]
        near = deficit(alone, found[name]) <= NEAR_POINTS or held(load, found[name])
        far = 0 if near else far + 1
        if far == 2 and not thorough:
            break
    ranked = sorted(found, key=lambda name: -found[name][0].finetuning)
    for keeps, near in (
        (lambda rows: deficit(alone, rows) <= POINTS, lambda rows: deficit(alone, rows) <= NEAR_POINTS),
        (lambda rows: held(load, rows), lambda rows: held(load, rows)),
    ):
        for name in [name for name in ranked if near(found[name])][:TRIED]:
            found[name] += [run(case, name) for case in load.seeds[len(found[name]) :]]
            if keeps(found[name]):
                break
    return found


def deficit(alone: list[Row], rows: list[Row]) -> float:
    """Points of strict attainment below serving alone, on average of the seeds that were run."""
    return mean([before.strict - row.strict for before, row in zip(alone, rows, strict=False)]).value


def held(load: Load, rows: list[Row]) -> bool:
    """LLMStation's measure: P99 of the first tokens, and of the requests' mean gaps, on average of the seeds."""
    setup = load.seeds[0].setup
    ttft_ms, tpot_ms = (
        mean(values).value for values in zip(*((r.p99_ttft_ms, r.p99_tpot_ms) for r in rows), strict=True)
    )
    return ttft_ms <= 1e3 * setup.ttft_s and tpot_ms <= 1e3 * setup.tpot_s


def frontier(load: Load, limits: tuple[float | None, ...], pool: Executor) -> list[tuple[float | None, Row]]:
    """Ours at several limits of the slowdown, on the first seed."""
    case = load.seeds[0]
    rows = pool.map(Case.run, [case] * len(limits), [OURS] * len(limits), limits)
    return list(zip(limits, rows, strict=True))


def stretched(case: Case) -> list[Arrival]:
    """A case's requests at its rate."""
    return at_rate(list(case.arrivals), case.capacity * case.load_percent / 100)
