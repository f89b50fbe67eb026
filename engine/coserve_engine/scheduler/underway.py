"""What engine and simulator do alike on a device that computes behind the host: enqueue units as the device needs them,
and keep the books of iterations of which not all is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import UnitWork
from coserve_engine.messages import IterationDone
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.iteration import Accounts, Forwarded, Units, UnitTimes
from coserve_engine.scheduler.plan import Plan, Unit, View
from coserve_engine.scheduler.timeline import Timeline


@dataclass(slots=True)
class Iteration:
    """One of which not all is over.

    Args:
        forward: the timeline's id of its forward, if it has one; `forwarded`: what came of that, once it is over.
        open: of its forward and units, how many are not over.
        sealed: no unit will be added; `dropped`: its forward was, which leaves no trace.
    """

    plan: Plan
    view: View
    forward: int | None = None
    forwarded: Forwarded | None = None
    times: UnitTimes = field(default_factory=list)
    open: int = 0
    end_s: float = 0.0
    sealed: bool = False
    dropped: bool = False


class Underway:
    """The books of a device with so many `layers` to compute.

    Args:
        now: the host's clock.
        done: takes what came of an iteration that is over.
    """

    def __init__(
        self,
        cost: CostModel,
        accounts: Accounts,
        layers: int,
        now: Callable[[], float],
        done: Callable[[IterationDone, Forwarded], None],
    ) -> None:
        self.timeline = Timeline()
        self._cost, self._accounts, self._layers, self._now, self._done = cost, accounts, layers, now, done

    def enqueue_units(
        self,
        now: Iteration,
        wait: Callable[[Callable[[], float]], None],
        interrupted: Callable[[], bool],
        backward: Callable[[Unit, UnitWork], None],
    ) -> None:
        """Enqueue units one by one, until one does not fit or a request comes; the first that does not is shortened.

        Args:
            wait: until the time that it is given, which marks and requests may move.
            backward: enqueues a unit of so much work.
        """
        plan, timeline = now.plan, self.timeline
        shapes = {p.shape.id: p.shape for p in now.view.passes}
        begun_s = timeline.begins_at(self._now())

        def due_s(unit_s: float) -> float:
            return -math.inf if interrupted() else timeline.unit_at(self._now(), unit_s)

        for planned in plan.units:
            shape = shapes[planned.pass_id]
            wait(partial(due_s, self._cost.unit_s(shape.backward(*planned[1:]))))
            if interrupted():
                return
            if now.forwarded is not None:
                begun_s = now.forwarded.end_s
            elif now.forward is not None:
                begun_s = timeline.end_of(now.forward, self._now())
            end_s = min(plan.until, begun_s + plan.units_s)
            unit = fitting_unit(planned, shape, self._cost, end_s - timeline.free_at(self._now()))
            if unit is None:
                return
            backward(unit, shape.backward(*unit[1:]))
            if unit is not planned:
                return

    def over(self, owner: Iteration, id: int, unit: UnitWork | None, start_s: float, end_s: float) -> bool:
        """What the timeline has under `id`, the owner's forward or a unit of so much work, took the device from
        `start_s` to `end_s`. Whether the owner's forward is over by that, if it was not before. `close` is to follow.
        """
        self.timeline.started(id, start_s)
        span = self.timeline.ended(id, end_s)
        owner.open, owner.end_s = owner.open - 1, span.end_s
        if unit is not None:
            owner.times.append((unit, span.seconds))
        if owner.dropped:
            self._accounts.rest()
        elif owner.forwarded is None:
            forwarded = span.start_s, span.end_s if unit is None else span.start_s
            owner.forwarded = self._accounts.forwarded(owner.plan, owner.view, forwarded)
            return True
        return False

    def seal(self, owner: Iteration) -> None:
        """No unit will be added."""
        owner.sealed = True
        self.close(owner)

    def close(self, owner: Iteration) -> None:
        """Keep the books of an iteration, if it is over."""
        if owner.open or not owner.sealed or owner.forwarded is None:
            return
        units = Units(owner.times, owner.end_s, 0.0)
        done = self._accounts.close(owner.plan, owner.view, owner.forwarded, units, self._layers)
        self._done(done, owner.forwarded)
