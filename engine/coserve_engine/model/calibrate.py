"""A short run of made-up work at start-up, so that the first plans rest on measurements of this machine and model.

It has a budget. What matters most is measured first; what there was no time for is taken from bytes and operations
(`prior`), and learnt from the work that comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from coserve_engine.config import LINEARS
from coserve_engine.device.timing import seconds_of
from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.fit import Prior
from coserve_engine.latency.regimes import SWEEP, TIMES, Regime, find_regime, may_have_knee
from coserve_engine.latency.work import NO_WORK, ForwardWork, UnitWork, decode_work, prefill_work
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.messages import LoraSpec, Pass, TrainSeq
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState
from coserve_engine.model.prior import Priors, Rates, analytic
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment, Unit

LEAST_BUDGET_S, SHARE_OF_LOADING = 5.0, 0.1
ROUNDS = 3
"""The first of them touches memory for the first time: it counts only for what no later one measured."""
CAUTION = 1.5
"""What no measurement had any of is taken to cost so much more than its bytes and operations say."""
PASS_ID = -1

Measured = tuple[int, ForwardWork | UnitWork, float]
"""(round, work, seconds)."""


def budget_s(loading_s: float) -> float:
    """Seconds that calibration may take of a start whose loading took so long."""
    return max(LEAST_BUDGET_S, SHARE_OF_LOADING * loading_s)


def calibrate(
    executor: Executor, cost: CostModel, clock: Callable[[], float], budget: float, rates: Rates | None = None
) -> tuple[str, ...]:
    """Measure decode, prefill and finetuning of several sizes and teach `cost`. Returns lines for the log.

    Args:
        budget: seconds, after which nothing more is begun, nor before where it would not fit; one decode row is always
            measured.
        rates: the machine's (default: they are measured).
    """
    started = clock()
    finetuning = executor.config.finetuning
    rates, tile = rates or Rates.measured(executor, clock), executor.numerics.tile
    priors = analytic(executor.model, rates, executor.dtype.itemsize)
    ridge = rates.ridge_rows(executor.dtype.itemsize)
    run = _Run(executor, clock, started + budget, priors)
    regime = find_regime(run.sweep(), tile, ridge) if may_have_knee(ridge, tile) else None
    for _ in range(ROUNDS):
        run.round()
    executor.buffers.clear()
    _teach(cost, priors, regime, run.measured, finetuning=finetuning)
    decode = decode_work([256] * 8, executor.numerics.tile, executor.reaches)
    decode_ms = 1e3 * cost.forward_s(decode)
    line = f"calibrated in {clock() - started:.1f} s: 8 decode rows at context 256: {decode_ms:.1f} ms"
    if regime is not None:
        line += f"; operations decide from {regime.knee} rows on, {regime.full} fill the device"
    if run.cut:
        line += f"; in {budget:.1f} s there was no time for every size"
    missing = _unmeasured([work for _, work, _ in run.measured], finetuning=finetuning)
    return (line + (f", and {', '.join(missing)} are known by bytes and operations only" if missing else ""),)


def _unmeasured(works: Sequence[ForwardWork | UnitWork], *, finetuning: bool) -> list[str]:
    """Kinds of work that none of `works` was."""
    forwards = [work for work in works if isinstance(work, ForwardWork)]
    had = {"prompts": any(work.prefill for work in forwards)}
    if finetuning:
        heads = {work.head for work in works if isinstance(work, UnitWork)}
        windows = any(work.finetune for work in forwards)
        had |= {"finetuning windows": windows, "units of the head": True in heads, "units": False in heads}
    return [kind for kind, measured in had.items() if not measured]


def _teach(
    cost: CostModel, priors: Priors, regime: Regime | None, measured: Sequence[Measured], *, finetuning: bool
) -> None:
    """Start `cost` from the priors, brought to the pace of what was measured, and let it learn that."""
    again = {work for number, work, _ in measured if number}
    counted = [(work, seconds) for number, work, seconds in measured if number or work not in again]
    forwards = [(work, seconds) for work, seconds in counted if isinstance(work, ForwardWork)]
    forward, pace = _at_pace(priors.forward, forwards, 1.0)
    units: list[Prior | None] = [None, None]
    if finetuning:
        for head, prior in enumerate((priors.unit, priors.head)):
            of_kind = [(w, s) for w, s in counted if isinstance(w, UnitWork) and w.head == bool(head)]
            units[head], _ = _at_pace(prior, of_kind, pace)
    cost.begin(forward, units[0], units[1], regime)
    for work, seconds in counted:
        _learn(cost, work, seconds)
    cost.forget_errors()


def _learn(cost: CostModel, work: ForwardWork | UnitWork, seconds: float) -> None:
    if isinstance(work, ForwardWork):
        cost.observe(work, seconds, ())
    else:
        cost.observe(NO_WORK, 0.0, [(work, seconds)])


def _at_pace(
    prior: Prior, measured: Sequence[tuple[ForwardWork | UnitWork, float]], otherwise: float
) -> tuple[Prior, float]:
    """The prior times what measurements took compared with it, or `otherwise` without any; and this factor."""
    features = [work.features() for work, _ in measured]
    ratios = [seconds / prior.seconds(x) for x, (_, seconds) in zip(features, measured, strict=True)]
    pace = median(ratios) if ratios else otherwise
    seen = [any(column) for column in zip(*features, strict=True)] or [False] * len(prior.coefficients)
    return prior.scaled([pace if had else CAUTION * pace for had in seen]), pace


class _Run:
    """The measurements, as far as the budget goes."""

    def __init__(self, executor: Executor, clock: Callable[[], float], end: float, priors: Priors) -> None:
        self._executor, self._clock, self._end = executor, clock, end
        self._expected = CostModel()
        """What the next measurement should take."""
        self._expected.begin(priors.forward, priors.unit, priors.head)
        self._number = 0
        self.measured: list[Measured] = []
        self.cut = False
        """Whether there was no time for some."""

    def round(self) -> None:
        """All sizes once, the important ones first."""
        executor = self._executor
        longest = min(executor.config.max_model_length, 384)
        short, full, tile = longest // 8, longest - 1, min(executor.numerics.tile, longest)
        first = ((Kind.DECODE, 1, short), (Kind.PREFILL, min(16, longest), 0))
        rest = (
            *((Kind.DECODE, n, at) for n in (1, 4, 12) for at in (short, full) if (n, at) != (1, short)),
            *((Kind.PREFILL, n, 0) for n in (longest // 2, longest)),
        )
        for shapes, length in ((first, tile), (rest, longest)):
            for kind, count, start in shapes:
                self._forward(kind, count, start)
            if executor.config.finetuning:
                self._pass(length)
        self._number += 1

    def sweep(self) -> list[tuple[int, float]]:
        """(rows, seconds) of prompts of ever more tiles, as far as a sequence goes."""
        executor, before = self._executor, len(self.measured)
        most = min(executor.config.max_model_length, executor.config.max_batch_tokens)
        for rows in (tiles * executor.numerics.tile for tiles in SWEEP * TIMES):
            if rows <= most:
                self._forward(Kind.PREFILL, rows, 0)
        self._number += 1
        return [(w.prefill, seconds) for _, w, seconds in self.measured[before:] if isinstance(w, ForwardWork)]

    def _fits(self, expected_s: float, end: float) -> bool:
        fits = not self.measured or self._clock() + expected_s <= end
        self.cut |= not fits
        return fits

    def _forward(self, kind: Kind, count: int, start: int) -> None:
        executor, how = self._executor, (self._executor.numerics.tile, self._executor.reaches)
        work = decode_work([start] * count, *how) if kind is Kind.DECODE else prefill_work(start, count, *how)
        if not self._fits(self._expected.forward_bound_s(work), self._end):
            return
        slots = range(count) if kind is Kind.DECODE else range(1)  # rows of one sequence: they only read it
        length = 1 if kind is Kind.DECODE else count
        tokens = [1] * (start + length)
        segments = tuple(Segment(kind, slot, start, length, sample=True) for slot in slots)
        pages = executor.ledger.reserve("calibration", executor.numerics.pages(len(tokens)))
        rows = {slot: SequenceRows(tokens, pages) for slot in slots}
        self._time(work, partial(self._choose, segments, rows))
        executor.ledger.free("calibration")

    def _choose(self, segments: tuple[Segment, ...], rows: Mapping[int, SequenceRows]) -> None:
        """A forward and the tokens that come of it."""
        forwarded = self._executor.forward(segments, rows)
        assert forwarded is not None  # nobody ends it
        self._executor.sample(forwarded)

    def _pass(self, length: int) -> None:
        """A pass of so many tokens, closed early where the time is up. It takes half of what is left at most, since
        its layers are alike.
        """
        if not self._fits(0.0, self._end):
            return
        executor = self._executor
        spec = LoraSpec(min(8, executor.config.max_rank), 16.0, LINEARS)
        layout = executor.layout(spec)
        draw = random.Random(length)
        tokens = tuple(draw.randrange(executor.model.vocab_size) for _ in range(length))
        work = Pass(PASS_ID, "calibration", 0, 0, (TrainSeq(0, tokens, (1.0,) * length),))
        pages = executor.ledger.reserve(f"pass:{PASS_ID}", pages_of_pass((length,), executor.numerics))
        weights = executor.trained(layout, layout.fresh(0, executor.dtypes.lora, executor.device))
        state = executor.open_pass(work, weights, layout, pages)
        now = self._clock()
        self._advance(state, now + (self._end - now) / 2)
        executor.close_pass(PASS_ID)

    def _advance(self, state: PassState, end: float) -> None:
        executor, shape = self._executor, state.shape
        for index in range(len(shape.tiles)):
            window, rows = shape.forward(index, index + 1), shape.window(index, index + 1)
            if not self._fits(self._expected.forward_bound_s(window), end):
                return
            self._time(window, partial(executor.forward, (rows,), {}))
        while not state.done:
            layer, stop = state.layer, state.end_tile
            first = max(0, stop - 1 - layer % 3)
            unit = shape.backward(layer, first, stop)
            if not self._fits(self._expected.unit_bound_s(unit), end):
                return
            self._time(unit, partial(executor.backward, Unit(PASS_ID, layer, first, stop)))

    def _time(self, work: ForwardWork | UnitWork, run: Callable[[], object]) -> None:
        seconds = seconds_of(self._executor.copies, self._clock, run)
        self.measured.append((self._number, work, seconds))
        _learn(self._expected, work, seconds)
