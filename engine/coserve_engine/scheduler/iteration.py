"""What engine and simulator do alike with a plan: run its units by the clock, and keep the books of what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import UnitWork
from coserve_engine.messages import IterationDone
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.load import ServingTime
from coserve_engine.scheduler.plan import Plan, Unit, View

UnitTimes = list[tuple[UnitWork, float]]


class Clock(NamedTuple):
    """Seconds now, and of all pauses of the machine until now: no plan foresees these, and nothing learns from them."""

    now: Callable[[], float]
    paused: Callable[[], float]


class Forwarded(NamedTuple):
    """A forward that began at `start_s` and has ended at `end_s`, `late_s` after it was to end by plan (before, where
    negative), with `paused_s` of pauses in it, and `pauses_s` in it and all iterations before; `finetuned`: it had
    windows, or units ran before it.
    """

    start_s: float
    end_s: float
    clock_paused_s: float
    """`Clock.paused` at its end."""
    paused_s: float
    pauses_s: float
    late_s: float
    finetuned: bool


class Units(NamedTuple):
    """The counts of each unit that ran and its seconds without pauses; when the last ended, and `Clock.paused` then."""

    times: UnitTimes
    end_s: float
    clock_paused_s: float


def less_pauses(span_s: float, paused_s: float) -> float:
    """Seconds that were computed of a span. The two clocks are read one after the other, so that a pause between the
    reads can be longer than what is left of the span: never below 0.
    """
    return max(0.0, span_s - paused_s)


def run_units(
    plan: Plan,
    view: View,
    cost: CostModel,
    clock: Clock,
    forwarded: Forwarded,
    backward: Callable[[Unit, UnitWork], None],
    interrupted: Callable[[], bool],
) -> Units:
    """Run units while each one's bound lies before the end, shorten the first that would not fit, and stop there.

    To be called when the forward has just ended. `backward` runs a unit of so much work. Stops between two units when
    `interrupted`.
    """
    ran: UnitTimes = []
    started, paused_s = forwarded.end_s, forwarded.clock_paused_s
    if not plan.units:
        return Units(ran, started, paused_s)
    started, paused_s = clock.now(), clock.paused()
    end = min(plan.until, started + plan.units_s)
    shapes = {p.shape.id: p.shape for p in view.passes}
    for planned in plan.units:
        shape = shapes[planned.pass_id]
        unit = None if interrupted() else fitting_unit(planned, shape, cost, end - started)
        if unit is None:
            break
        _, layer, first, stop = unit
        work = shape.backward(layer, first, stop)
        backward(unit, work)
        ended, paused_until_s = clock.now(), clock.paused()
        ran.append((work, less_pauses(ended - started, paused_until_s - paused_s)))
        started, paused_s = ended, paused_until_s
        if unit is not planned:
            break
    return Units(ran, started, paused_s)


class Accounts:
    """Teaches the latency model and says where the time went."""

    def __init__(self, cost: CostModel, clock: Clock) -> None:
        self._cost, self._clock = cost, clock
        self.time = ServingTime()
        self._paused_s = 0.0
        """Pauses until this iteration began."""
        self._pauses_s = 0.0
        """Pauses of all iterations and of the turnarounds between them."""
        self._last_end: tuple[float, float] | None = None
        """When the last iteration ended, and pauses until then."""
        self._begin_by_s = math.inf
        """When the next forward is to begin, as planned: what it begins later makes its tokens late."""
        self._units_ran = False

    def rest(self) -> None:
        """Nothing is left to do: what passes until the next iteration is no turnaround."""
        self._last_end, self._begin_by_s, self._units_ran = None, math.inf, False

    def begin(self) -> None:
        """An iteration begins."""
        self._paused_s = self._clock.paused()

    def forwarded(self, plan: Plan, view: View, span: tuple[float, float] | None = None) -> Forwarded:
        """The forward of an iteration that began at `view.now` has just ended, or there was none. `span`: when it began
        and ended, where a device says so.
        """
        start_s, end_s = span or (view.now, self._clock.now())
        paused_s = self._clock.paused()
        pauses_s = self._pauses_s + paused_s - (self._last_end[1] if self._last_end else self._paused_s)
        begun_s = min(view.now, self._begin_by_s)
        deadline_s = min([s.deadline for s in view.sequences if s.decoding], default=-math.inf)
        if deadline_s > -math.inf:
            by_s = max(deadline_s - view.reserve_s, begun_s + self._cost.forward_bound_s(plan.serving))
        else:
            by_s = begun_s + self._cost.forward_bound_s(plan.work)
        finetuned = self._units_ran or plan.work.finetune > 0
        return Forwarded(start_s, end_s, paused_s, paused_s - self._paused_s, pauses_s, end_s - by_s, finetuned)

    def close(self, plan: Plan, view: View, forwarded: Forwarded, units: Units, layers: int) -> IterationDone:
        """An iteration has ended with `units`."""
        cost = self._cost
        times, end_s, paused_s = units
        forward_s = less_pauses(forwarded.end_s - forwarded.start_s, forwarded.paused_s)
        unit_s, units_expected_s, backward_rows = 0.0, 0.0, 0
        for work, seconds in times:
            unit_s += seconds
            units_expected_s += cost.unit_s(work)
            backward_rows += 0 if work.head else work.rows
        turnaround_s, pause_s = None, paused_s - self._paused_s
        if self._last_end is not None:
            last_s, last_paused_s = self._last_end
            pause_s = paused_s - last_paused_s
            turnaround_s = less_pauses(forwarded.start_s - last_s, self._paused_s - last_paused_s)
        total_s, serving_s = cost.forward_s(plan.work), cost.forward_s(plan.serving)
        prefill_s = serving_s - cost.forward_s(plan.serving._replace(prefill=0)) if plan.serving.prefill else 0.0
        per_s = forward_s / total_s if total_s > 0 else 0.0
        finetune_s = unit_s + per_s * max(0.0, total_s - serving_s)
        self.time.add(
            finetune_s,
            per_s * prefill_s,
            end_s - forwarded.start_s + (turnaround_s or 0.0),
            busy=bool(view.sequences),
        )
        excess_s = forwarded.late_s
        if not view.sequences:  # such a forward is longer than any that serves: its own error says little of those
            excess_s = min(excess_s, forwarded.paused_s)
        cost.observe(plan.work, forward_s, times, turnaround_s)
        self._last_end = end_s, paused_s
        self._pauses_s += pause_s
        self._begin_by_s = forwarded.end_s + plan.units_s + cost.turnaround_s
        self._units_ran = bool(times)
        return IterationDone(
            started_s=forwarded.start_s,
            duration_s=end_s - forwarded.start_s,
            until_s=plan.until + (forwarded.start_s - view.now),
            decode_tokens=plan.work.decode,
            prefill_tokens=plan.work.prefill,
            finetune_tokens=plan.work.finetune,
            backward_tokens=backward_rows / layers,
            predicted_s=total_s + units_expected_s,
            paused_s=paused_s - self._paused_s,
            excess_s=excess_s if forwarded.finetuned else None,
            reserve_s=view.reserve_s,
            pauses_s=self._pauses_s,
        )
