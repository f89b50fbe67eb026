"""What a forward and a unit take on the simulated machine: the truth that the latency model has to find out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import mul
from pathlib import Path
from typing import NamedTuple, Protocol

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.regimes import SWEEP, TIMES, find_regime, may_have_knee
from coserve_engine.latency.work import NO_WORK, Features, ForwardWork, UnitWork, decode_work, prefill_work
from coserve_engine.scheduler.plan import PassShape
from coserve_engine.simulate.device import Host
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.roofline import LLAMA_1B_ON_H200, LLAMA_ON_H200


class Machine(Protocol):
    """A model on a device, of so many `layers`. A device that computes behind its `host` is planned ahead; where there
    is none the host computes itself, `turnaround_ms` from the end of an iteration to the next plan.
    """

    @property
    def layers(self) -> int: ...

    @property
    def host(self) -> Host | None: ...

    @property
    def turnaround_ms(self) -> float: ...

    @property
    def ridge_rows(self) -> float:
        """Rows with which a weight's operations take as long as its bytes."""

    @property
    def fixed_s(self) -> float:
        """Seconds that a forward takes at least besides its rows."""

    def forward_s(self, work: ForwardWork) -> float:
        """Seconds of a forward without noise."""

    def rows_s(self, work: ForwardWork) -> float:
        """Seconds that these rows add at least to a forward that holds others."""

    def unit_s(self, work: UnitWork) -> float:
        """Seconds of a unit without noise."""

    def launch_s(self, work: ForwardWork | UnitWork) -> float:
        """Seconds of the host to launch it: a device is not through with it before."""

    def slower(self, factor: float) -> Machine:
        """A part of the machine: everything takes `factor` times as long."""


class ForwardCost(NamedTuple):
    """Milliseconds for each of `ForwardWork.features`: fixed, a row of each kind, an attention call, 1,000 keys,
    100,000 query-key pairs.
    """

    fixed_ms: float
    decode_ms: float
    prefill_ms: float
    finetune_ms: float
    call_ms: float = 0.0
    kv_ms: float = 0.0
    pairs_ms: float = 0.0


class UnitCost(NamedTuple):
    """Milliseconds for each of `UnitWork.features`: fixed, a row, a tile, 100,000 query-key pairs."""

    fixed_ms: float
    row_ms: float
    tile_ms: float = 0.0
    pairs_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearMachine:
    """A machine whose times are linear in the counts of work, as those of a CPU nearly are."""

    forward: ForwardCost
    unit: UnitCost
    head: UnitCost
    layers: int
    turnaround_ms: float = 1.0
    host: Host | None = None

    def forward_s(self, work: ForwardWork) -> float:
        """Seconds of a forward without noise."""
        return _seconds(self.forward, work.features())

    @property
    def ridge_rows(self) -> float:
        """None: a row costs the same in any company."""
        return 0.0

    @property
    def fixed_s(self) -> float:
        """Seconds of a forward besides its rows."""
        return self.forward.fixed_ms / 1e3

    def rows_s(self, work: ForwardWork) -> float:
        """Seconds of these rows."""
        return self.forward_s(work) - self.fixed_s

    def unit_s(self, work: UnitWork) -> float:
        """Seconds of a unit without noise."""
        return _seconds(self.head if work.head else self.unit, work.features())

    def launch_s(self, work: ForwardWork | UnitWork) -> float:
        """None: what is launched is computed."""
        return 0.0

    def slower(self, factor: float) -> LinearMachine:
        """A part of the machine: everything takes `factor` times as long."""
        return replace(
            self,
            forward=ForwardCost(*(factor * ms for ms in self.forward)),
            unit=UnitCost(*(factor * ms for ms in self.unit)),
            head=UnitCost(*(factor * ms for ms in self.head)),
        )


def _seconds(cost: ForwardCost | UnitCost, features: Features) -> float:
    return float(sum(map(mul, cost, features))) / 1e3


CPU = LinearMachine(ForwardCost(15.5, 1.32, 0.66, 0.66), UnitCost(2.0, 0.157), UnitCost(1.0, 0.2), layers=8)
"""A Llama of 32 M parameters in fp32 on one AVX2 core: measured (units of 64, 128, 256 rows take 12, 22, 42 ms)."""


class Sizes(NamedTuple):
    """Of an engine, as its machine can hold them (as in `world.Setup`)."""

    max_requests: int
    max_batch_tokens: int
    kv_pages: int
    pass_tokens: int


SIZES = dict.fromkeys(
    ("h200", "h200-1b"), Sizes(max_requests=256, max_batch_tokens=8192, kv_pages=10_000, pass_tokens=4096)
)
"""80 GiB of keys and values; passes of so many tokens fill an H200."""
DEFAULT_SIZES = Sizes(max_requests=64, max_batch_tokens=512, kv_pages=1024, pass_tokens=512)
MACHINES: dict[str, Machine] = {"cpu": CPU, "h200": LLAMA_ON_H200, "h200-1b": LLAMA_1B_ON_H200}


def read_machine(name: str) -> Machine:
    """One of MACHINES, or a JSON file {"forward": {...}, "unit": {...}, "head": {...}, "layers": n}.

    Raises:
        SimulationError: neither, or a field is missing, unknown or not a number of at least zero.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        raw = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(
            f"cost {name!r} is neither {' nor '.join(MACHINES)} nor a file ({error.strerror})"
        ) from None
    except json.JSONDecodeError as error:
        raise SimulationError(f"cost file {name} is no JSON: {error}") from None
    try:
        parts: dict[str, ForwardCost | UnitCost] = {"forward": ForwardCost(**raw["forward"])}
        for part in ("unit", "head"):
            parts[part] = UnitCost(**raw[part])
        for part, cost in parts.items():
            for field, value in cost._asdict().items():
                if not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise SimulationError(f"cost file {name}: {part}.{field} is {value!r}; it must be a number >= 0")
        return LinearMachine(**{**raw, **parts})
    except KeyError as error:
        raise SimulationError(f"cost file {name}: {error.args[0]!r} is missing") from None
    except TypeError as error:
        raise SimulationError(f"cost file {name}: {error}") from None


def machine_of(cost: CostModel, layers: int) -> LinearMachine:
    """The machine that an engine's latency model has learned."""
    forward, unit, head = ([1e3 * c for c in coefficients] for coefficients in cost.coefficients)
    return LinearMachine(
        ForwardCost(*forward), UnitCost(*unit), UnitCost(*head), layers, 1e3 * cost.median_turnaround_s
    )


def calibrated(machine: Machine, tile: int, noise: float, source: random.Random) -> CostModel:
    """A latency model after the start-up run of an engine on this machine."""

    def error() -> float:
        return math.exp(source.gauss(0.0, noise))

    ridge = machine.ridge_rows
    sweep = _sweep(machine, tile, error) if may_have_knee(ridge, tile) else []
    times = [(work.rows, seconds) for work, seconds, _ in sweep]
    cost = CostModel(find_regime(times, tile, ridge) if times else None)
    for work, seconds, units in sweep:
        cost.observe(work, seconds, units)
    for _ in range(2):
        for work in (
            *(decode_work([at] * n, tile) for n in (1, 4, 12) for at in (48, 383)),
            *(prefill_work(0, n, tile) for n in (16, 192, 384)),
            *(ForwardWork(finetune=tile, calls=1, kv_rows=kv, pairs=tile * kv) for kv in range(tile, 385, tile)),
        ):
            cost.observe(work, _alone_s(machine, work, machine.forward_s(work)) * error(), ())
        for head in (False, True):
            for tiles in (1, 2, 3) * 3:
                unit = UnitWork(head, tiles * tile, tiles, 0 if head else tiles * tile * 192)
                cost.observe(NO_WORK, 0.0, [(unit, _alone_s(machine, unit, machine.unit_s(unit)) * error())])
    cost.forget_errors()
    return cost


def _alone_s(machine: Machine, work: ForwardWork | UnitWork, device_s: float) -> float:
    """Seconds of what is launched when the device has nothing else."""
    return max(device_s, machine.launch_s(work))


def _sweep(
    machine: Machine, tile: int, error: Callable[[], float]
) -> list[tuple[ForwardWork, float, list[tuple[UnitWork, float]]]]:
    """Windows of one sequence, as long as a sweep's, and a layer's and the head's unit of each, with their seconds."""
    shape = PassShape(0, tuple((tile, (n + 1) * tile) for n in range(max(SWEEP))), machine.layers, training=True)
    found = []
    for tiles in SWEEP * TIMES:
        work, units = shape.forward(0, tiles), [shape.backward(layer, 0, tiles) for layer in (0, machine.layers)]
        times = [(unit, _alone_s(machine, unit, machine.unit_s(unit)) * error()) for unit in units]
        found.append((work, _alone_s(machine, work, machine.forward_s(work)) * error(), times))
    return found
