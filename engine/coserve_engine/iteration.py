"""What engine and simulator do alike with a plan: run its units by the clock, and keep the books of what came of it."""

from __future__ import annotations

from collections.abc import Callable

from coserve_engine.cost import CostModel
from coserve_engine.load import ServingTime
from coserve_engine.messages import IterationDone
from coserve_engine.plan import Plan, Unit, View
from coserve_engine.schedule import fitting_unit
from coserve_engine.work import UnitWork

UnitTimes = list[tuple[UnitWork, float]]


def run_units(
    plan: Plan,
    view: View,
    cost: CostModel,
    clock: Callable[[], float],
    backward: Callable[[Unit, UnitWork], None],
    interrupted: Callable[[], bool],
) -> UnitTimes:
    """Run units while each one's bound lies before the end, shorten the first that would not fit, and stop there.

    To be called when the forward has just ended. `backward` runs a unit of so much work. Stops between two units when
    `interrupted`. Returns the counts and seconds of each unit that ran.
    """
    ran: UnitTimes = []
    if not plan.units:
        return ran
    started = clock()
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
        ended = clock()
        ran.append((work, ended - started))
        started = ended
        if unit is not planned:
            break
    return ran


class Accounts:
    """Teaches the latency model and says where the time went."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.time = ServingTime()
        self._last_end: float | None = None

    def rest(self) -> None:
        """Nothing is left to do: what passes until the next iteration is no turnaround."""
        self._last_end = None

    def close(self, plan: Plan, view: View, forward_end: float, units: UnitTimes, layers: int) -> IterationDone:
        """An iteration that began at `view.now` has ended with `units`."""
        cost = self._cost
        forward_s = forward_end - view.now
        unit_s, units_expected_s, backward_rows = 0.0, 0.0, 0
        for work, seconds in units:
            unit_s += seconds
            units_expected_s += cost.unit_s(work)
            backward_rows += 0 if work.head else work.rows
        end = forward_end + unit_s
        turnaround_s = None if self._last_end is None else view.now - self._last_end
        total_s, serving_s = cost.forward_s(plan.work), cost.forward_s(plan.serving)
        prefill_s = serving_s - cost.forward_s(plan.serving._replace(prefill=0)) if plan.serving.prefill else 0.0
        per_s = forward_s / total_s if total_s > 0 else 0.0
        finetune_s = unit_s + per_s * max(0.0, total_s - serving_s)
        self.time.add(
            finetune_s,
            per_s * prefill_s,
            end - view.now + (turnaround_s or 0.0),
            busy=bool(view.sequences),
        )
        cost.observe(plan.work, forward_s, units, turnaround_s)
        self._last_end = end
        return IterationDone(
            started_s=view.now,
            duration_s=end - view.now,
            until_s=plan.until,
            decode_tokens=plan.work.decode,
            prefill_tokens=plan.work.prefill,
            finetune_tokens=plan.work.finetune,
            backward_tokens=backward_rows / layers,
            predicted_s=total_s + units_expected_s,
        )
