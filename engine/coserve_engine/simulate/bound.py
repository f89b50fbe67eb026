"""How much could be had at all: the capacity for serving, and the most that finetuning can get beside it."""

from __future__ import annotations

from dataclasses import replace

from coserve_engine.latency.work import decode_work, prefill_work
from coserve_engine.simulate.machine import Machine
from coserve_engine.simulate.peers import serving_alone
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate
from coserve_engine.simulate.world import World

ATTAINED_PERCENT = 99.0
SEARCH_REQUESTS = 1000
STEPS = 8


def capacity(setup: Setup, arrivals: list[Arrival]) -> float:
    """Requests a second of this trace of which serving alone still keeps the promise to 99 % (strict): load 100 %.

    By bisection over runs of the trace's first 1,000 requests, stretched in time; to 1 % of the rate.
    """
    some = arrivals[:SEARCH_REQUESTS]
    low, high = 0.0, 1.0 / max(1e-9, sum(service_s(setup.machine, a, setup.tile) for a in some) / len(some))
    for _ in range(STEPS):
        middle = (low + high) / 2
        run = World(setup, at_rate(some, middle), serving_alone, finetuning=False).run()
        low, high = (middle, high) if run.strict_percent >= ATTAINED_PERCENT else (low, middle)
    return low


def service_s(machine: Machine, arrival: Arrival, tile: int) -> float:
    """Seconds that a request's rows take, without the fixed part of iterations: P * t_prefill + G * t_decode, where
    the first of G + 1 tokens comes with the prompt.
    """
    decode_s = machine.rows_s(decode_work([arrival.prompt + arrival.output // 2], tile))
    prefill_s = machine.rows_s(prefill_work(0, arrival.prompt, tile))
    return prefill_s + (arrival.output - 1) * decode_s


def work_conserving_bound(setup: Setup, arrivals: list[Arrival], rate: float, margin: float = 1.0) -> float:
    """The most that finetuning can get, as a share of what it gets alone:

        1 - [rate * (P * t_prefill + G * t_decode) + t0 / (margin * SLO)]

    for `rate` requests a second of P prompt and G decoded tokens: the machine never idles, serving's rows take what
    they take, and the fixed part t0 of an iteration (with its turnaround) is paid as rarely as the time per output
    token allows (`margin` of it; 1 is what no policy exceeds while somebody decodes). In times without requests no t0
    is due, so that a run may come slightly above it.
    """
    rows_s = sum(service_s(setup.machine, a, setup.tile) for a in arrivals) / len(arrivals)
    fixed_s = setup.machine.fixed_s + setup.machine.turnaround_ms / 1e3
    return max(0.0, 1.0 - (rate * rows_s + fixed_s / (margin * setup.tpot_s)))


def part(setup: Setup, share: float) -> Setup:
    """A static split's machine for serving."""
    return replace(setup, machine=setup.machine.slower(1.0 / share))
