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
from dataclasses import dataclass
from functools import partial

from coserve_engine.device.protocol import Mark
from coserve_engine.latency.work import UnitWork
from coserve_engine.layout.masks import TokenMasks
from coserve_engine.messages import IterationDone, Token
from coserve_engine.running.parts import Emit, Interrupted, Parts
from coserve_engine.scheduler.iteration import Accounts, Clock, Forwarded
from coserve_engine.scheduler.plan import Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.scheduler.timeline import LEAD_S
from coserve_engine.scheduler.underway import Iteration, Underway
from coserve_engine.serving.requests import Computed
from coserve_engine.serving.serving import Flight

LOOK_S = 5e-4
"""A request that comes while the host waits for the device is seen within."""


@dataclass(slots=True)
class _Iteration(Iteration):
    """With what its forward computes of requests."""

    flight: Flight | None = None


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
        self._underway = Underway(parts.cost, self.accounts, parts.layers, clock, self._done)
        self._timeline = self._underway.timeline
        self._queue: deque[_Enqueued] = deque()
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
        if plan.segments:
            self._forward(now)
        if not now.dropped:
            self._underway.enqueue_units(now, self._wait, interrupted, partial(self._backward, now))
        self._underway.seal(now)
        needs_host = any(sequence.needs_host for sequence in view.sequences)
        self._wait(lambda: self._timeline.plan_at(self._now(), needs_host=needs_host))

    # ---- the host ----

    def _forward(self, now: _Iteration) -> None:
        parts, plan = self._parts, now.plan
        expected_s = parts.cost.forward_s(plan.work)
        bound = parts.executor.bind(plan.segments, parts.serving.requests.running)
        at_s = self._now()
        now.forward = id = self._timeline.enqueue(expected_s, at_s, forward=True)
        self._timeline.planned(at_s - self._begun_s)
        rows = parts.serving.launched(plan.segments, self._timeline.end_of(id, at_s))
        start = last = self._device.mark()
        ran = 0

        def goes_on(layer: int) -> bool:
            """A forward that serves somebody does, and what is over meanwhile is taken over; of another no more is
            enqueued than a lead, or the layer that the device is at, so that it can be dropped.
            """
            nonlocal ran, last
            ran = layer
            if now.view.sequences:
                self._look()
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
            now.flight = Flight(rows, parts.executor.sample(computed, self._masks(rows)))
        self._enqueued(now, id, None, start)

    def _masks(self, rows: tuple[Computed, ...]) -> TokenMasks | None:
        """Once the tokens before them are known, while the device computes the rows themselves."""
        serving = self._parts.serving
        self._wait(lambda: -math.inf if serving.known(rows) else math.inf)
        return serving.masks(rows)

    def _enqueued(self, owner: _Iteration, id: int, unit: UnitWork | None, start: Mark) -> None:
        owner.open += 1
        self._queue.append(_Enqueued(id, owner, unit, start, self._device.mark()))

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
            if self._underway.over(done.owner, done.id, done.unit, done.start.at_s(), done.end.at_s()):
                self._forwarded(done.owner)
            self._underway.close(done.owner)

    def _forwarded(self, owner: _Iteration) -> None:
        """A forward is over, or there was none: the tokens are there."""
        parts, forwarded = self._parts, owner.forwarded
        assert forwarded is not None  # it is over
        tokens: tuple[Token, ...] = ()
        if owner.flight is not None:
            events, tokens = parts.serving.commit(owner.flight, self._now)
            parts.events.extend(events)
        parts.emission(tokens, forwarded, owner.plan)
        if self._emit is not None and parts.events:
            self._emit(parts.taken())

    def _done(self, done: IterationDone, forwarded: Forwarded) -> None:
        self._parts.events.append(done)
