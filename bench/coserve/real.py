"""A short replay by the real engine: what its work costs on this machine, and what the simulator makes of the same.

Ours and serving alone (and any other policy, if asked) take turns on the same requests, in the order A B B A, so that
a machine that drifts drifts for both. It runs in a process of its own, on one core, as the engine does.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coserve.families import ALONE, OURS
from coserve_engine.config import EngineConfig
from coserve_engine.host import set_environment
from coserve_engine.latency.reserve import FixedReserve
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler.schedule import decide
from coserve_engine.simulate.bound import capacity
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.machine import ForwardCost, LinearMachine, UnitCost, machine_of
from coserve_engine.simulate.pauses import NONE, Pauses
from coserve_engine.simulate.policies import Entry, policy_named
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate
from coserve_engine.simulate.world import World, alone_tokens_per_s

if TYPE_CHECKING:
    from replay import Replay
    from replay_run import Run

SETTLE_S = 5.0
WARM_REQUESTS, WARM_PER_S = 16, 1.5


@dataclass(frozen=True, slots=True)
class Ask:
    """What to replay: `policies` at `load_percent`, `blocks` times each, for about `seconds` a block."""

    arrivals: tuple[Arrival, ...]
    load_percent: float
    ttft_s: float
    tpot_s: float
    seconds: float
    blocks: int
    alone_s: float
    policies: tuple[str, ...] = (OURS, ALONE)


@dataclass(frozen=True, slots=True)
class Replayed:
    """One block, real or simulated. Percentages: strict attainment, and finetuning of its rate alone."""

    policy: str
    requests: int
    strict: float
    quiet_strict: float
    """The same by a clock that stands still while the machine pauses."""
    finetuning: float
    tokens_per_s: float
    median_gap_ms: float
    p99_gap_ms: float
    p99_ttft_ms: float
    reserve_ms: float
    """Of each gap, kept free for the machine's pauses: what the real engine learned, on average."""


@dataclass(frozen=True, slots=True)
class Block:
    """A policy's turn in the real engine."""

    policy: str
    coming: list[Arrival]
    run: Run


@dataclass(frozen=True, slots=True)
class Measured:
    """What the engine learned, the rates alone, and each block beside its simulation."""

    machine: LinearMachine
    noise: float
    pauses: Pauses
    kv_pages: int
    max_requests: int
    alone: float
    simulated_alone: float
    load_percent: float
    tpot_ms: float
    rate: float
    """Requests a second."""
    real: tuple[Replayed, ...]
    simulated: tuple[Replayed, ...]
    notes: tuple[str, ...]
    """What the engine says of its start."""

    def error_percent(self, policy: str) -> float:
        """By how much the simulator's finetuning rate differs from the real one, all blocks together."""
        real, simulated = (
            statistics.mean([b.tokens_per_s for b in blocks if b.policy == policy])
            for blocks in (self.real, self.simulated)
        )
        return 100 * (simulated / real - 1)

    def setup(self, ttft_s: float, tpot_s: float) -> Setup:
        """This machine for the simulator, without its pauses."""
        return Setup(
            self.machine,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            noise=self.noise,
            max_requests=self.max_requests,
            kv_pages=self.kv_pages,
        )


def read_measured(path: Path) -> Measured:
    """What an earlier run measured, from its results.json."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["measured"]
        costs = {"forward": ForwardCost, "unit": UnitCost, "head": UnitCost}
        machine = {**raw["machine"], **{part: kind(*raw["machine"][part]) for part, kind in costs.items()}}
        blocks = {part: tuple(Replayed(**block) for block in raw[part]) for part in ("real", "simulated")}
        pauses = Pauses(raw["pauses"]["per_s"], tuple(raw["pauses"]["ms"]))
        rest = {**blocks, "machine": LinearMachine(**machine), "pauses": pauses, "notes": tuple(raw["notes"])}
        return Measured(**{**raw, **rest})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SimulationError(f"--measured {path} is no results.json of this command: {error!r}") from None


def measure(ask: Ask) -> Measured:
    """Start an engine on one core, and replay."""
    from random_model import write_random_model  # noqa: PLC0415  (torch: the simulator's processes need none)
    from replay import PASS_TOKENS, PASSES_PER_STEP, Replay  # noqa: PLC0415

    set_environment()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder))
        replay = Replay(EngineConfig(folder, ttft_s=ask.ttft_s, tpot_s=ask.tpot_s))
        engine = replay.engine
        replay.run([], lambda seconds, run: seconds < SETTLE_S)
        # What requests cost is learned of requests: a load that is found from start-up's figures may be another.
        replay.run(at_rate(list(ask.arrivals[:WARM_REQUESTS]), WARM_PER_S), lambda seconds, run: run.left > 0)
        setup = Setup(
            _learned(replay),
            ttft_s=ask.ttft_s,
            tpot_s=ask.tpot_s,
            max_requests=engine.config.places,
            kv_pages=engine.executor.ledger.total + 1,
            pass_tokens=PASS_TOKENS,
            passes_per_step=PASSES_PER_STEP,
        )
        rate = ask.load_percent / 100 * capacity(setup, list(ask.arrivals))
        if rate == 0:
            raise SimulationError(f"serving alone never keeps {1e3 * ask.tpot_s:.0f} ms here; choose a longer --slo-ms")
        before = _alone(replay, ask.alone_s)
        blocks = _turns(replay, ask, rate)
        after = _alone(replay, ask.alone_s)
        return _beside(ask, setup, rate, (before + after) / 2, blocks, tuple(engine.ready().notes))


def _learned(replay: Replay) -> LinearMachine:
    return machine_of(replay.engine.cost, replay.engine.executor.model.layers)


def _entry(name: str, tpot_s: float, machine: LinearMachine) -> Entry:
    return policy_named(name, tpot_s, lambda rows: machine.forward_s(ForwardWork(prefill=rows)))


def _alone(replay: Replay, seconds: float) -> float:
    """Tokens a second of finetuning with nobody to serve."""
    replay.policy = decide
    return replay.run([], lambda now_s, run: now_s < seconds).result.finetune_tokens_per_s


def _turns(replay: Replay, ask: Ask, rate: float) -> list[Block]:
    """The blocks, each pair on the same requests."""
    count, blocks = max(8, round(rate * ask.seconds)), []
    for number in range(ask.blocks):
        first = number * count % max(1, len(ask.arrivals) - count)
        some = ask.arrivals[first : first + count]
        coming = at_rate([a._replace(at_s=a.at_s - some[0].at_s) for a in some], rate)
        for name in ask.policies[:: -1 if number % 2 else 1]:
            entry = _entry(name, ask.tpot_s, _learned(replay))
            replay.policy = entry.policy
            run = replay.run(coming, lambda now_s, run: run.left > 0, stops=entry.stops)
            run.learn(replay.engine)
            blocks.append(Block(name, coming, run))
            print(f"  {name}: {count} requests in {run.result.seconds:.0f} s", flush=True)
    return blocks


def _beside(ask: Ask, sizes: Setup, rate: float, alone: float, blocks: list[Block], notes: tuple[str, ...]) -> Measured:
    """Each block beside its simulation, on what the engine learned in all of them, with its pauses and the reserve
    that it kept for them.
    """
    machine = mean_machine([machine for block in blocks for machine in block.run.learned])
    noise = statistics.mean([noise for block in blocks for noise in block.run.noises])
    ms = tuple(ms for block in blocks for ms in block.run.measured_pauses().ms)
    pauses = Pauses(len(ms) / sum(block.run.result.seconds for block in blocks), ms)
    setup = replace(sizes, machine=machine, noise=noise, pauses=pauses)
    simulated_alone = alone_tokens_per_s(replace(setup, pauses=NONE))
    real, simulated = [], []
    for seed, block in enumerate(blocks):
        quiet = block.run.quiet.result.strict_percent
        reserve_s = statistics.mean(block.run.reserves) if block.run.reserves else 0.0
        real.append(_replayed(block.policy, block.run.result, quiet, alone, reserve_s))
        entry = _entry(block.policy, ask.tpot_s, machine)
        result = World(
            replace(setup, seed=seed),
            block.coming,
            entry.policy,
            finetuning=entry.finetuning,
            stops=entry.stops,
            reserve=FixedReserve(reserve_s),
        ).run()
        simulated.append(_replayed(block.policy, result, result.strict_percent, simulated_alone, reserve_s))
    return Measured(
        machine,
        noise,
        pauses,
        sizes.kv_pages,
        sizes.max_requests,
        alone,
        simulated_alone,
        ask.load_percent,
        1e3 * ask.tpot_s,
        rate,
        tuple(real),
        tuple(simulated),
        notes,
    )


def mean_machine(machines: list[LinearMachine]) -> LinearMachine:
    """Each cost the mean of what was learned."""
    costs = [
        [statistics.mean(values) for values in zip(*(getattr(m, part) for m in machines), strict=True)]
        for part in ("forward", "unit", "head")
    ]
    turnaround_ms = statistics.mean([m.turnaround_ms for m in machines])
    forward, unit, head = costs
    return LinearMachine(
        ForwardCost(*forward), UnitCost(*unit), UnitCost(*head), machines[0].layers, turnaround_ms=turnaround_ms
    )


def _replayed(policy: str, result: Result, quiet: float, alone: float, reserve_s: float) -> Replayed:
    return Replayed(
        policy,
        len(result.requests),
        result.strict_percent,
        quiet,
        100 * result.finetune_tokens_per_s / alone,
        result.finetune_tokens_per_s,
        result.gap_ms(50),
        result.gap_ms(99),
        result.ttft_ms(99),
        1e3 * reserve_s,
    )
