"""`python -m coserve_engine.simulate`: policies compared on a trace."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from coserve_engine.simulate.bound import capacity
from coserve_engine.simulate.compare import Case, Row, table
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.machine import DEFAULT_SIZES, SIZES, read_machine
from coserve_engine.simulate.pauses import NONE, read_pauses
from coserve_engine.simulate.policies import FORMS, named, policy_named
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, drawn, read_trace
from coserve_engine.simulate.world import alone_tokens_per_s

SLOWDOWNS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, None)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the plot. Returns the exit status: 2 for a flag or a trace that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        setups, arrivals, names = _setups(options), _arrivals(options), _names(options)
        if options.plot is not None:
            try:
                from coserve_engine.simulate import plot  # noqa: PLC0415  (a development dependency)
            except ImportError as error:
                raise SimulationError(
                    f"--plot needs {error.name}; install the extra 'dev' or leave --plot away"
                ) from None
        with ProcessPoolExecutor(options.processes) as pool:
            cases = _cases(setups, arrivals, options.load, pool)
            started = time.perf_counter()
            timed = list(pool.map(_run, [(case, name, None) for case in cases for name in names]))
            rows = [row for row, _ in timed]
            print(table(rows))
            frontier: list[Row] = []
            if options.frontier:
                slower = list(pool.map(_run, [(case, "ours", limit) for case in cases for limit in SLOWDOWNS]))
                timed, frontier = timed + slower, [row for row, _ in slower]
                print("\nours with finetuning.maxSlowdownPercent 0, 25, 50, 100, 200, 400, 800, none")
                print(table(frontier))
    except SimulationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_pace(timed, time.perf_counter() - started))
    if options.plot is not None:
        plot.draw(rows, frontier, options.plot)
    return 0


def _run(job: tuple[Case, str, float | None]) -> tuple[Row, float]:
    """The run, and the seconds that it took here."""
    case, name, limit = job
    started = time.perf_counter()
    return case.run(name, limit), time.perf_counter() - started


def _pace(timed: list[tuple[Row, float]], wall_s: float) -> str:
    """How much faster than real time the runs of the tables were, together and each."""
    simulated_s = sum(row.simulated_s for row, _ in timed)
    each = simulated_s / sum(seconds for _, seconds in timed)
    return (
        f"simulated {simulated_s / 3600:.1f} h in {wall_s:.1f} s: {simulated_s / wall_s:,.0f} times real time, "
        f"{each:,.0f} times in each process"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m coserve_engine.simulate", description=__doc__)
    parser.add_argument("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--drawn", type=float, metavar="CV", help="instead: gamma gaps of this variation, 1 = Poisson")
    parser.add_argument("--slo-ms", type=float, nargs="+", default=[100.0, 200.0], help="time per output token")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="time to first token")
    parser.add_argument("--load", type=float, nargs="+", default=[30.0, 50.0, 70.0], help="percent of serving capacity")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--prompt-divisor", type=float, default=8.0)
    parser.add_argument("--output-divisor", type=float, default=4.0)
    parser.add_argument("--cost", default="cpu", help="cpu, h200, h200-1b, or a JSON file")
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of log(actual / true)")
    parser.add_argument("--pauses", default="none", help="none, heavy, or a JSON file; the reserve is learnt")
    for field, size in DEFAULT_SIZES._asdict().items():
        others = "".join(f", {name}: {getattr(sizes, field)}" for name, sizes in SIZES.items())
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, help=f"default: {size}{others}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="NAME",
        help=f"default: those of the table; also, of any N: {', '.join(FORMS)}".replace("%", "%%"),
    )
    parser.add_argument("--frontier", action="store_true", help="also ours at several maxSlowdownPercent")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    return parser


def _setups(options: argparse.Namespace) -> list[Setup]:
    given = {field: getattr(options, field) for field in DEFAULT_SIZES._fields if getattr(options, field) is not None}
    sizes = SIZES.get(options.cost, DEFAULT_SIZES)._replace(**given)
    for flag, values in (
        ("--slo-ms", options.slo_ms),
        ("--load", options.load),
        ("--ttft-ms", [options.ttft_ms]),
        ("--prompt-divisor", [options.prompt_divisor]),
        ("--output-divisor", [options.output_divisor]),
        ("--processes", [options.processes]),
        *((f"--{field.replace('_', '-')}", [size]) for field, size in sizes._asdict().items()),
    ):
        for value in values:
            if not value > 0:
                raise SimulationError(f"{flag} is {value}; it must be above zero")
    if not 0 <= options.noise < 1:
        raise SimulationError(f"--noise is {options.noise}; it must lie in [0, 1)")
    if options.requests < 2:
        raise SimulationError(f"--requests is {options.requests}; at least 2 are needed")
    machine, pauses = read_machine(options.cost), read_pauses(options.pauses)
    return [
        Setup(
            machine,
            ttft_s=options.ttft_ms / 1e3,
            tpot_s=slo_ms / 1e3,
            noise=options.noise,
            seed=options.seed,
            pauses=pauses,
            **sizes._asdict(),
        )
        for slo_ms in options.slo_ms
    ]


def _names(options: argparse.Namespace) -> list[str]:
    names: list[str] = options.policies or list(named(1.0, lambda rows: rows))
    for name in names:
        policy_named(name, 1.0, lambda rows: rows)
    return names


def _cases(setups: list[Setup], arrivals: list[Arrival], loads: list[float], pool: Executor) -> list[Case]:
    alone = pool.map(alone_tokens_per_s, setups)
    quiet = [replace(setup, pauses=NONE) for setup in setups]  # or a load with pauses would be another load
    most = pool.map(capacity, quiet, [arrivals] * len(setups))
    cases = []
    for setup, requests_per_s, tokens_per_s in zip(setups, most, alone, strict=True):
        slo_ms = 1e3 * setup.tpot_s
        if requests_per_s == 0:
            raise SimulationError(f"--slo-ms is {slo_ms:g}: serving alone never keeps it here; choose a longer one")
        print(
            f"SLO {slo_ms:.0f} ms: load 100 % is {requests_per_s:.2f} requests/s; "
            f"finetuning alone {tokens_per_s:.0f} tokens/s"
        )
        cases += [Case(setup, tuple(arrivals), requests_per_s, tokens_per_s, load) for load in loads]
    return cases


def _arrivals(options: argparse.Namespace) -> list[Arrival]:
    if (options.trace is None) == (options.drawn is None):
        raise SimulationError("give exactly one of --trace FILE and --drawn CV")
    if options.trace is not None:
        return read_trace(options.trace, options.requests, options.prompt_divisor, options.output_divisor)
    if not options.drawn > 0:
        raise SimulationError(f"--drawn is {options.drawn}; the coefficient of variation must be above zero")
    prompt, output = round(1155 / options.prompt_divisor), round(211 / options.output_divisor)
    return drawn(options.requests, 1.0, options.drawn, prompt, output, options.seed)


if __name__ == "__main__":
    sys.exit(main())
