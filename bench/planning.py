"""What an iteration costs beside the model: View, decide, the latency model's lesson and the load report.

Prints microseconds of each and their sum for 32 requests and two jobs with two live passes of 512 tokens each, beside
the floor that the sum is held to: 1,000 us (half a percent of the default time per output token).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import timeit
from collections.abc import Callable

from coserve_engine.iteration import Accounts, run_units
from coserve_engine.load import Demand, saturation_percent
from coserve_engine.plan import PassShape, PassView, SequenceView, View
from coserve_engine.schedule import decide
from coserve_engine.simulate.machine import CPU, calibrated

FLOOR_US = 1000.0
TILE = 64


def view(requests: int, source: random.Random) -> View:
    """`requests` that decode, and four passes: of each job one in backward and one in forward."""
    contexts = [source.randrange(100, 900) for _ in range(requests)]
    shape = tuple((TILE, (n + 1) * TILE) for n in range(8))
    passes = tuple(
        PassView(PassShape(2 * job + n, shape, 8, True), 8 * (1 - n) + 2 * n, 5 + 3 * n, 8)
        for job in range(2)
        for n in range(2)
    )
    sequences = tuple(SequenceView(n, c, c + 1, 0.2, -1.0, 0.2) for n, c in enumerate(contexts))
    return View(0.0, sequences, passes, 0, 1.0, 0.2, 512, TILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="print where the time of decide and observe goes")
    options = parser.parse_args()
    source = random.Random(0)
    cost = calibrated(CPU.slower(0.5), TILE, 0.05, source)  # where so many requests leave finetuning its part
    seen, clock = view(options.requests, source), 0.0
    plan = decide(seen, cost, 0)
    print(f"a plan of {len(plan.segments)} segments and {len(plan.units)} units")
    accounts = Accounts(cost)

    def now() -> float:
        return clock

    def backward(unit: object) -> None:
        nonlocal clock
        clock += 0.02

    def observe() -> None:
        nonlocal clock
        clock = forward_s = cost.forward_s(plan.work)
        units = run_units(plan, seen, cost, now, backward, lambda: False)
        accounts.close(plan, seen, forward_s * source.uniform(0.95, 1.05), units, 8)

    demand = Demand(tuple(s.done for s in seen.sequences), (), (), 0.6, 900, 4096)
    parts: dict[str, Callable[[], object]] = {
        "view": lambda: view(options.requests, source),
        "decide": lambda: decide(seen, cost, 0),
        "units, accounts and lesson": observe,
        "load report (at most 4 a second)": lambda: saturation_percent(demand, cost, 1.0, 0.2, TILE),
    }
    total_us = 0.0
    for name, part in parts.items():
        best_us = 1e6 * min(timeit.repeat(part, number=200, repeat=5)) / 200
        total_us += best_us
        print(f"{name:<34}{best_us:8.0f} us")
    print(f"{'sum':<34}{total_us:8.0f} us, floor {FLOOR_US:.0f} us: {total_us / FLOOR_US:.2f} x")
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(lambda: [(decide(seen, cost, 0), observe()) for _ in range(500)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
