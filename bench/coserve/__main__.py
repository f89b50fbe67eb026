"""Co-serving beside its ablations and its peers: `python -m coserve [--quick]`.

Measures what the engine's work costs on this machine by a short replay of ours and of serving alone in turns, then
replays slices of an Azure trace under every policy on that machine, simulated. Writes results.json, results.md and
three plots.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from coserve import plots
from coserve.families import ALONE, OURS
from coserve.minute import minute
from coserve.real import Ask, Measured, measure, read_measured
from coserve.report import as_json, machine_name, markdown
from coserve.study import Load, Results, frontier, loads_of, run_all
from coserve_engine.simulate.compare import Row
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.trace import Arrival, read_trace

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "examples" / "data" / "AzureLLMInferenceTrace_conv_10min.csv"
SLOWDOWNS = (0.0, 0.5, 1.0, 2.0, 4.0, None)


def main(arguments: list[str] | None = None) -> int:
    """Run, print the Markdown, and say where everything lies. Returns the exit status: 2 for what cannot be run."""
    options = _parser(arguments).parse_args(arguments)
    try:
        return _run(options)
    except SimulationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    arrivals = read_trace(options.trace, 10**9, options.prompt_divisor, options.output_divisor)
    measured = read_measured(options.measured) if options.measured else _measure(options, arrivals)
    print(f"{time.monotonic() - started:.0f} s; every policy, simulated:", flush=True)
    with ProcessPoolExecutor(options.processes) as pool:
        setups = [measured.setup(options.ttft_ms / 1e3, slo_ms / 1e3) for slo_ms in options.slo_ms]
        loads = loads_of(setups, arrivals, options.load, options.seeds, options.requests, pool)
        results = run_all(loads, pool, thorough=not options.quick)
        shown = min(loads, key=lambda load: (abs(load.percent - options.shown_load), -load.slo_ms))
        limits = frontier(shown, SLOWDOWNS, pool)
    machine = machine_name()
    (options.out / "results.json").write_text(as_json(results, measured, machine), encoding="utf-8")
    text = markdown(results, measured, machine)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    _draw(results, shown, limits, options.out)
    print(text)
    print(f"{time.monotonic() - started:.0f} s in all; tables, plots and every run are in {options.out}")
    return 0


def _measure(options: argparse.Namespace, arrivals: list[Arrival]) -> Measured:
    """In a process of its own, which stays on one core."""
    ask = Ask(
        tuple(arrivals),
        options.real_load,
        options.ttft_ms / 1e3,
        max(options.slo_ms) / 1e3,
        options.real_s,
        options.real_blocks,
        options.alone_s,
        (OURS, ALONE, *options.real_policies),
    )
    print("the real engine, in turns:", flush=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        return one.submit(measure, ask).result()


def _draw(results: Results, shown: Load, limits: list[tuple[float | None, Row]], out: Path) -> None:
    plots.rate_against_load(results, out / "rate-load.png")
    plots.rate_against_gap(shown, results, limits, out / "rate-gap.png")
    busy = max(results.loads, key=lambda load: (load.percent <= 70, load.percent, load.slo_ms))
    names = (OURS, ALONE, "fixed 256 rows")
    plots.one_minute([minute(busy.seeds[0], name, 10.0) for name in names], busy.slo_ms, out / "minute.png")


def _parser(arguments: list[str] | None) -> argparse.ArgumentParser:
    quick = "--quick" in (sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m coserve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, loads and requests: 10 minutes on 2 cores")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "bench", help="folder for what is written")
    parser.add_argument("--trace", type=Path, default=TRACE, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--prompt-divisor", type=float, default=8.0)
    parser.add_argument("--output-divisor", type=float, default=4.0)
    parser.add_argument("--slo-ms", type=float, nargs="+", default=[100.0, 200.0], help="time per output token")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="time to first token")
    loads = [10.0, 30.0, 50.0, 70.0, 90.0]
    parser.add_argument("--load", type=float, nargs="+", default=loads, help="percent of serving capacity")
    parser.add_argument("--seeds", type=int, default=3 if quick else 6, help="slices of the trace")
    parser.add_argument("--requests", type=int, default=250 if quick else 450, help="in a slice")
    parser.add_argument("--real-load", type=float, default=50.0)
    parser.add_argument("--real-s", type=float, default=25.0 if quick else 120.0, help="seconds of a block")
    parser.add_argument("--real-blocks", type=int, default=2 if quick else 4, help="turns of each policy")
    parser.add_argument("--real-policies", nargs="*", default=[], metavar="NAME", help="other policies to replay, too")
    parser.add_argument("--alone-s", type=float, default=5.0 if quick else 15.0, help="finetuning alone, twice")
    parser.add_argument("--measured", type=Path, help="results.json of an earlier run: no real engine is run")
    parser.add_argument("--shown-load", type=float, default=30.0, help="load of the plot against the median gap")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
