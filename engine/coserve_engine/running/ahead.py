"""Iterations on a device that computes behind the host, such as a GPU: the host plans and enqueues, and learns of what
the device did by its marks.

An iteration is enqueued a lead before the device is through with the one before, units as the device needs them
(`scheduler.timeline`). What a forward gave is taken over when its mark is over; where the next one is enqueued before,
its decode rows take their tokens on the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coserve_engine.device.protocol import Mark
from coserve_engine.latency.work import UnitWork
from coserve_engine.messages import Token
from coserve_engine.running.parts import Emit, Interrupted, Parts
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.iteration import Accounts, Clock, Forwarded, Units, UnitTimes
from coserve_engine.scheduler.plan import Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.scheduler.timeline import LEAD_S, Timeline
from coserve_engine.serving.serving import Flight

LOOK_S = 5e-4
"""A request that comes while the host waits for the device is seen within."""


@dataclass(slots=True)
class _Iteration:
    """One of which not all is over. `sealed`: no unit will be added; `dropped`: its forward was, which leaves no
    trace.
    """

    plan: Plan
    view: View
    flight: Flight | None = None
    forwarded: Forwarded | None = None
    times: UnitTimes = field(default_factory=list)
    open: int = 0
    """Of its forward and units, how many are not over."""
    end_s: float = 0.0
    sealed: bool = False
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class _Enqueued:
    """A forward, or a unit of such counts, between two marks; `id` is the timeline's."""

    id: int
    owner: _Iteration
    unit: UnitWork | None
    start: Mark
    end: Mark


class Ahead:
    """Runs plans, each until the next is to be made."""

    def __init__(self, parts: Parts, clock: Callable[[], float]) -> None:
        self._parts, self._now = parts, clock
        self._device = parts.executor.copies
        # What stops the host does not stop the device: no pauses.
        self.accounts = Accounts(parts.cost, Clock(clock, lambda: 0.0))
        self._timeline = Timeline()
        self._queue: deque[_Enqueued] = deque()
        self._iterations: deque[_Iteration] = deque()
        self._begun_s = 0.0
        self._interrupted: Interrupted = lambda: False
        self._emit: Emit | None = None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._queue)

    def begin(self, now: float) -> float:
        """A step begins; when what it plans will."""
        self._begun_s = now
        self.accounts.begin()
        return self._timeline.begins_at(now)

    def rest(self, emit: Emit | None) -> None:
        """Nothing was planned: wait for what is under way, if anything is, which may leave something to plan."""
        self._emit = emit
        if self._queue:
            self._device.wait(self._queue[0].end, LOOK_S)
            self._look()
        if not self._queue:
            self.accounts.rest()
            self._device.rest()

    def run(self, plan: Plan, view: View, interrupted: Interrupted, emit: Emit | None) -> None:
        """Enqueue an iteration and its units, until it is time for the next plan."""
        self._interrupted, self._emit = interrupted, emit
        now = _Iteration(plan, view)
        self._iterations.append(now)
        if plan.segments:
            self._forward(now)
        if not now.dropped:
            self._units(now)
        now.sealed = True
        self._close(now)
        needs_host = any(sequence.needs_host for sequence in view.sequences)
        self._wait(lambda: self._timeline.plan_at(self._now(), needs_host=needs_host))

    # ---- the host ----

    def _forward(self, now: _Iteration) -> None:
        parts, plan = self._parts, now.plan
        expected_s = parts.cost.forward_s(plan.work)
        bound = parts.executor.bind(plan.segments, parts.serving.requests.running)
        at_s = self._now()
        id = self._timeline.enqueue(expected_s, at_s, forward=True)
        self._timeline.planned(at_s - self._begun_s)
        start = last = self._device.mark()
        ran = 0

        def goes_on(layer: int) -> bool:
            """A forward that serves somebody does; of another no more is enqueued than a lead, or the layer that the
            device is at, so that it can be dropped.
            """
            nonlocal ran, last
            ran = layer
            if now.view.sequences:
                return True
            ahead_s = expected_s * (1 - layer / parts.layers) + LEAD_S
            before, last = last, self._device.mark()

            def due_s() -> float:
                if before.over() or self._interrupted():
                    return -math.inf
                return self._timeline.end_of(id, self._now()) - ahead_s

            self._wait(due_s)
            return not (gives_way(plan, now.view, parts.cost, layer / parts.layers) and self._interrupted())

        computed = parts.executor.run(*bound, goes_on)
        if computed is None:
            now.dropped = True
            self._timeline.shortened(id, expected_s * ran / parts.layers)
        else:
            parts.charge(plan)
            sampled = parts.executor.sample(computed)
            now.flight = parts.serving.launched(plan.segments, sampled, self._timeline.end_of(id, self._now()))
        self._enqueued(now, id, None, start)

    def _enqueued(self, owner: _Iteration, id: int, unit: UnitWork | None, start: Mark) -> None:
        owner.open += 1
        self._queue.append(_Enqueued(id, owner, unit, start, self._device.mark()))

    def _units(self, now: _Iteration) -> None:
        """Enqueue units one by one, until one does not fit or a request comes; the first that does not is shortened."""
        cost, timeline, plan = self._parts.cost, self._timeline, now.plan
        shapes = {p.shape.id: p.shape for p in now.view.passes}
        begun_s = timeline.begins_at(self._now())
        for planned in plan.units:
            shape = shapes[planned.pass_id]
            unit_s = cost.unit_s(shape.backward(*planned[1:]))
            self._wait(lambda s=unit_s: -math.inf if self._interrupted() else timeline.unit_at(self._now(), s))  # type: ignore[misc]
            if self._interrupted():
                return
            if now.forwarded is not None:
                begun_s = now.forwarded.end_s
            elif now.flight is not None:
                begun_s = timeline.end_of(self._id_of(now), self._now())
            end_s = min(plan.until, begun_s + plan.units_s)
            unit = fitting_unit(planned, shape, cost, end_s - timeline.free_at(self._now()))
            if unit is None:
                return
            self._backward(now, unit, shape.backward(*unit[1:]))
            if unit is not planned:
                return

    def _id_of(self, now: _Iteration) -> int:
        return next(enqueued.id for enqueued in self._queue if enqueued.owner is now and enqueued.unit is None)

    def _backward(self, now: _Iteration, unit: Unit, work: UnitWork) -> None:
        id = self._timeline.enqueue(self._parts.cost.unit_s(work), self._now())
        start = self._device.mark()
        self._parts.backward(unit, work.rows)
        self._enqueued(now, id, work, start)

    # ---- waiting for the device ----

    def _wait(self, until: Callable[[], float]) -> None:
        """Until the time that `until` says, which marks and requests may move."""
        while True:
            self._look()
            left_s = until() - self._now()
            if left_s <= 0:
                return
            self._device.wait(self._queue[0].end if self._queue else None, min(left_s, LOOK_S))

    def _look(self) -> None:
        """Take over what is over."""
        while self._queue and self._queue[0].start.over() and self._queue[0].end.over():
            done = self._queue.popleft()
            owner = done.owner
            self._timeline.started(done.id, done.start.at_s())
            span = self._timeline.ended(done.id, done.end.at_s())
            owner.open, owner.end_s = owner.open - 1, span.end_s
            if owner.dropped:
                self.accounts.rest()
            elif owner.forwarded is None:
                self._forwarded(owner, (span.start_s, span.end_s if done.unit is None else span.start_s))
            if done.unit is not None:
                owner.times.append((done.unit, span.seconds))
            self._close(owner)

    def _forwarded(self, owner: _Iteration, span: tuple[float, float]) -> None:
        """A forward is over, or there was none: the tokens are there."""
        parts = self._parts
        tokens: tuple[Token, ...] = ()
        if owner.flight is not None:
            events, tokens = parts.serving.commit(owner.flight, self._now)
            parts.events.extend(events)
        owner.forwarded = self.accounts.forwarded(owner.plan, owner.view, span)
        parts.emission(tokens, owner.forwarded, owner.plan)
        if self._emit is not None and parts.events:
            self._emit(parts.taken())

    def _close(self, owner: _Iteration) -> None:
        """Keep the books of an iteration that is over."""
        if owner.open or not owner.sealed:
            return
        self._iterations.remove(owner)
        if owner.forwarded is not None:
            units = Units(owner.times, owner.end_s, 0.0)
            parts = self._parts
            parts.events.append(self.accounts.close(owner.plan, owner.view, owner.forwarded, units, parts.layers))
