"""The start-up run teaches the latency model within its budget and leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_driver import FakeClock

from coserve_engine.config import EngineConfig
from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import NO_WORK, ForwardWork, UnitWork, decode_work, prefill_work
from coserve_engine.model.calibrate import budget_s, calibrate
from coserve_engine.model.executor import Executor, Forwarded
from coserve_engine.model.prior import Rates, analytic
from coserve_engine.scheduler.plan import Kind, Segment, Unit


@pytest.mark.parametrize("finetuning", (True, False))
def test_calibration_leaves_nothing_behind(driver: Any, finetuning: bool) -> None:
    d = driver(jitter_s=0.002, finetuning=finetuning)
    ready = d.engine.ready()
    executor, cost = d.engine.executor, d.engine.cost
    assert executor.ledger.free_pages == executor.ledger.total == ready.kv_total_pages
    assert executor.passes == {}
    assert cost.forward_s(ForwardWork(decode=4, calls=4, kv_rows=256, pairs=4096)) > 0
    for head in (True, False):
        assert (cost.unit_bound_s(UnitWork(head, 64, 1, 4096)) > 0) == finetuning
    assert torch.isfinite(executor.cache.v).all()


def test_what_follows_is_not_changed_by_calibration(driver: Any, training: Any, start_job: Any) -> None:
    fresh, calibrated = driver(), driver()
    calibrated.engine.ready()
    for d in (fresh, calibrated):
        d.submit(start_job(), *training(steps=2))
        d.run()
    assert torch.equal(fresh.parameters(), calibrated.parameters())


# ---- a model that is slow for its budget ----


class SlowExecutor(Executor):
    """The small model, but by its clock a forward or unit takes what `machine` says."""

    def __init__(self, config: EngineConfig, clock: FakeClock) -> None:
        super().__init__(config)
        self.clock, self.machine = clock, CostModel()
        self.longest_s = 0.0

    def _takes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.longest_s = max(self.longest_s, seconds)

    def forward(self, segments: tuple[Segment, ...], *rest: Any) -> Forwarded | None:
        how, work = (self.numerics.tile, self.reaches), NO_WORK
        for kind, slot, start, length, _ in segments:
            if kind is Kind.DECODE:
                work = work.plus(decode_work([start], *how))
            elif kind is Kind.PREFILL:
                work = work.plus(prefill_work(start, length, *how))
            else:
                shape = self.passes[slot].shape
                work = work.plus(shape.forward(*shape.tiles_of(Segment(kind, slot, start, length))))
        self._takes(self.machine.forward_s(work))
        return super().forward(segments, *rest)

    def backward(self, unit: Unit) -> None:
        self._takes(self.machine.unit_s(self.passes[unit.pass_id].shape.backward(unit.layer, unit.first, unit.end)))
        super().backward(unit)


Slow = tuple[SlowExecutor, CostModel, tuple[str, ...]]
FORWARDS = (
    *(decode_work([at] * n, 64) for n in (1, 8, 24) for at in (30, 250, 900)),
    *(prefill_work(at, n, 64) for n in (16, 64, 256) for at in (0, 512)),
    *(ForwardWork(finetune=64 * n, calls=n, kv_rows=256 * n, pairs=64 * 256 * n) for n in (1, 3)),
    decode_work([250] * 8, 64).plus(ForwardWork(finetune=128, calls=2, kv_rows=512, pairs=128 * 256)),
)
UNITS = tuple(UnitWork(head, 64 * n, n, 0 if head else 64 * n * 256) for head in (True, False) for n in (1, 3))


@pytest.fixture
def slow(plain: str) -> Callable[..., Slow]:
    """(executor, cost, notes) after a calibration in which a decode row takes so many seconds; what bytes and
    operations say is wrong by another factor, up to `wrong` in both directions, for each feature.
    """

    def make(decode_s: float, budget: float = 5.0, wrong: float = 2.0, seed: int = 0) -> Slow:
        clock, source = FakeClock(), random.Random(seed)
        config = EngineConfig(plain, max_model_length=512, kv_cache_bytes=4 << 20)
        executor, cost = SlowExecutor(config, clock), CostModel()
        size = decode_work([32], 64).features()
        rates = Rates(1e6, 1e7)
        pace = decode_s / analytic(executor.model, rates, 4).forward.seconds(size)
        rates = Rates(1e6 / pace, 1e7 / pace)
        priors = analytic(executor.model, rates, 4)
        executor.machine.begin(
            *(
                prior.scaled([wrong ** source.uniform(-1, 1) for _ in prior.coefficients])
                for prior in (priors.forward, priors.unit, priors.head)
            )
        )
        return executor, cost, calibrate(executor, cost, clock, budget, rates)

    return make


def ratios(cost: CostModel, machine: CostModel) -> list[float]:
    """Predicted / actual."""
    return [
        *(cost.forward_s(work) / machine.forward_s(work) for work in FORWARDS),
        *(cost.unit_s(unit) / machine.unit_s(unit) for unit in UNITS),
    ]


@pytest.mark.parametrize("decode_s", (0.05, 0.1, 0.5, 2.0))
@pytest.mark.parametrize("budget", (5.0, 20.0))
def test_it_ends_with_its_budget(slow: Callable[..., Slow], decode_s: float, budget: float) -> None:
    executor, _, notes = slow(decode_s, budget)
    assert executor.clock.now - 1.0 < budget + executor.longest_s / 2
    assert "no time for every size" in notes[0]
    assert executor.ledger.free_pages == executor.ledger.total
    assert executor.passes == {}


def test_one_decode_row_is_measured_whatever_it_takes(slow: Callable[..., Slow]) -> None:
    executor, _, notes = slow(30.0)
    assert executor.clock.now - 1.0 == executor.longest_s
    for kind in ("prompts", "finetuning windows", "units of the head", "units"):
        assert kind in notes[0]


def test_a_quick_model_is_measured_whole(slow: Callable[..., Slow]) -> None:
    _, _, notes = slow(0.0005)
    assert "no time" not in notes[0]
    assert "only" not in notes[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decode_s", (0.1, 0.5, 2.0, 30.0))
def test_what_was_not_measured_is_known_roughly_and_soon_well(
    slow: Callable[..., Slow], decode_s: float, seed: int
) -> None:
    executor, cost, _ = slow(decode_s, seed=seed)
    begin = ratios(cost, executor.machine)
    assert all(1 / 4 < ratio < 6 for ratio in begin)
    source = random.Random(seed)
    for _ in range(120):
        unit, work = source.choice(UNITS), source.choice(FORWARDS)
        cost.observe(
            work,
            executor.machine.forward_s(work) * source.uniform(0.98, 1.02),
            [(unit, executor.machine.unit_s(unit) * source.uniform(0.98, 1.02))],
        )
    assert all(0.8 < ratio < 1.25 for ratio in ratios(cost, executor.machine))


@pytest.mark.parametrize("seed", range(4))
def test_what_was_not_measured_is_bounded_with_caution(slow: Callable[..., Slow], seed: int) -> None:
    """Only a decode row was: where all the rest differs by another tenth or two from what bytes and operations say,
    the bounds hold.
    """
    executor, cost, _ = slow(30.0, wrong=1.2, seed=seed)
    assert all(cost.forward_bound_s(work) > executor.machine.forward_s(work) for work in FORWARDS)
    assert all(cost.unit_bound_s(unit) > executor.machine.unit_s(unit) for unit in UNITS)


def test_without_bytes_and_operations_what_was_not_measured_would_cost_nothing(
    slow: Callable[..., Slow],
) -> None:
    """The control: what a model learns of the one measurement alone."""
    machine, cost, row = slow(30.0)[0].machine, CostModel(), decode_work([48], 64)
    cost.observe(row, machine.forward_s(row), ())
    assert cost.forward_s(row) == pytest.approx(machine.forward_s(row))
    assert min(ratios(cost, machine)) == 0.0


def test_loading_that_takes_long_leaves_more_time() -> None:
    assert budget_s(0.0) == budget_s(50.0) == 5.0
    assert budget_s(120.0) == pytest.approx(12.0)


# ---- a device with a knee ----


class Kneed(SlowExecutor):
    """A forward takes 4 ms until its rows, launched by two tiles, take longer."""

    def forward(self, segments: tuple[Segment, ...], *rest: Any) -> Forwarded | None:
        rows = -(-sum(segment.length for segment in segments) // 128) * 128
        self._takes(max(4e-3, rows * 2e-5))
        return Executor.forward(self, segments, *rest)


def calibrated(plain: str, rates: Rates) -> tuple[CostModel, str]:
    clock = FakeClock()
    executor, cost = Kneed(EngineConfig(plain, max_model_length=512, kv_cache_bytes=4 << 20), clock), CostModel()
    (note,) = calibrate(executor, cost, clock, 5.0, rates)
    return cost, note


def test_a_knee_is_measured_where_the_rates_allow_one(plain: str) -> None:
    cost, note = calibrated(plain, Rates(4e9, 4e11))
    assert cost.regime is not None and "fill the device" in note
    for rows in (8, 100, 256, 384, 512):
        expected = max(4e-3, -(-rows // 128) * 128 * 2e-5)
        assert cost.forward_s(prefill_work(0, rows, 64)) == pytest.approx(expected, rel=0.15)


def test_where_operations_decide_from_a_dozen_rows_on_there_is_one_line(plain: str) -> None:
    """The control: the same times, by the rates of a CPU."""
    cost, note = calibrated(plain, Rates(4e9, 2e10))
    assert cost.regime is None and "fill the device" not in note
    assert cost.forward_s(prefill_work(0, 100, 64)) != pytest.approx(4e-3, rel=0.02)


def test_rates_are_measured_with_rows_that_meet_the_ridge(plain: str) -> None:
    """A device of which a product takes 1 ms up to 200 rows: a tile would say that the ridge lies at a tile."""
    clock = FakeClock()
    executor = SlowExecutor(EngineConfig(plain, max_model_length=512, kv_cache_bytes=4 << 20), clock)
    model, weights = executor.model, executor.transformer.weights

    class Timed:
        def __init__(self, size: int) -> None:
            self.size = size

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now += self.size * 1e-6 * max(1.0, len(x) / 200)
            return x

    layer = weights.layers[0].linears
    for name in layer:
        out, into = model.linear_shape(name)
        layer[name] = Timed(out * into)  # type: ignore[assignment]
    object.__setattr__(weights, "head", Timed(model.vocab_size * model.hidden))
    assert Rates.measured(executor, clock).ridge_rows(4) == pytest.approx(200, rel=0.05)
