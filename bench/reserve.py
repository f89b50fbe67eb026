"""The learnt reserve beside the best fixed one, on a simulated machine that pauses.

Every fixed reserve of a sweep, and the learnt one, get the same requests and the same pauses. The best fixed reserve is
the one under which finetuning gets most while 99 % of requests get what was promised (strictly); nobody knows it
before. Floors: the learnt reserve attains 99 % too, and gets at least 95 % of the best fixed one's finetuning.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from coserve_engine.latency.reserve import MOST_SHARE, FixedReserve, Reserve
from coserve_engine.scheduler.schedule import decide
from coserve_engine.simulate.bound import ATTAINED_PERCENT, capacity
from coserve_engine.simulate.machine import DEFAULT_SIZES, SIZES, read_machine
from coserve_engine.simulate.pauses import read_pauses
from coserve_engine.simulate.peers import serving_alone
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate, drawn
from coserve_engine.simulate.world import World

STEPS = 12
PROMPT, OUTPUT = 144, 53


class Ran(NamedTuple):
    """Strict attainment in percent, finetuning tokens a second, and the reserve at the end in ms."""

    strict: float
    rate: float
    reserve_ms: float


def run(job: tuple[Setup, list[Arrival], float | None]) -> Ran:
    """With a fixed reserve of so many seconds, or the learnt one."""
    setup, arrivals, fixed_s = job
    reserve = Reserve(setup.tpot_s, ATTAINED_PERCENT) if fixed_s is None else FixedReserve(fixed_s)
    result = World(setup, arrivals, decide, reserve=reserve).run()
    return Ran(result.strict_percent, result.finetune_tokens_per_s, 1e3 * reserve.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cost", default="cpu", help="cpu, h200, or a JSON file")
    parser.add_argument("--pauses", nargs="+", default=["heavy", "none"], help="none, heavy, or a JSON file")
    parser.add_argument("--load", type=float, nargs="+", default=[30.0, 70.0])
    parser.add_argument("--slo-ms", type=float, nargs="+", default=[100.0, 200.0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    machine, sizes = read_machine(options.cost), SIZES.get(options.cost, DEFAULT_SIZES)._asdict()
    lengths = drawn(options.requests, 1.0, 1.0, PROMPT, OUTPUT, options.seed)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for slo_ms, load in product(options.slo_ms, options.load):
            setup = Setup(machine, tpot_s=slo_ms / 1e3, seed=options.seed, **sizes)
            arrivals = at_rate(lengths, load / 100 * capacity(setup, lengths))
            for name in options.pauses:
                paused = replace(setup, pauses=read_pauses(name))
                alone = World(paused, arrivals, serving_alone, finetuning=False).run().strict_percent
                print(f"\nSLO {slo_ms:.0f} ms, load {load:.0f} %, pauses {name}: serving alone {alone:.2f} %")
                compare(pool, paused, arrivals)


def compare(pool: Executor, setup: Setup, arrivals: list[Arrival]) -> None:
    """Print the sweep, and the learnt reserve beside the best of it."""
    sweep = [MOST_SHARE * setup.tpot_s * step / STEPS for step in range(STEPS + 1)]
    *fixed, learnt = pool.map(run, [(setup, arrivals, seconds) for seconds in (*sweep, None)])
    for ran in fixed:
        print(f"  fixed {ran.reserve_ms:4.0f} ms {ran.strict:7.2f} % {ran.rate:7.1f} tokens/s")
    print(f"  learnt {learnt.reserve_ms:3.0f} ms {learnt.strict:7.2f} % {learnt.rate:7.1f} tokens/s", end="")
    keeping = [ran for ran in fixed if ran.strict >= ATTAINED_PERCENT]
    if keeping:
        best = max(keeping, key=lambda ran: ran.rate)
        print(f": {100 * learnt.rate / best.rate:.1f} % of the best fixed one's ({best.reserve_ms:.0f} ms)", flush=True)
    else:
        print(f"; no fixed reserve keeps {ATTAINED_PERCENT:.0f} %", flush=True)


if __name__ == "__main__":
    main()
