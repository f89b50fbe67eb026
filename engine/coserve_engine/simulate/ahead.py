"""A machine whose device computes behind the host, such as a GPU: the host plans and launches, and learns of what the
device did by its marks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from coserve_engine.latency.work import ForwardWork, UnitWork
from coserve_engine.scheduler.iteration import Accounts, Clock
from coserve_engine.scheduler.plan import Kind, PassView, Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.scheduler.timeline import LEAD_S
from coserve_engine.scheduler.underway import Iteration, Underway
from coserve_engine.simulate.parts import Parts
from coserve_engine.simulate.requests import Request


@dataclass(slots=True)
class _Iteration(Iteration):
    """With its requests that sample, what it enqueued of its forward, and the passes as they stood before."""

    passes: dict[int, PassView] = field(default_factory=dict)
    enqueued: _Enqueued | None = None
    sampled: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class _Enqueued:
    """What the device computes from `start_s` to `end_s`, which the host does not know before; `unit`: of which counts,
    None for a forward.
    """

    id: int
    owner: _Iteration
    unit: UnitWork | None
    start_s: float
    end_s: float


class Ahead:
    """Runs plans, each until the next is to be made."""

    def __init__(self, parts: Parts) -> None:
        self._setup, self._time, self._cost, self._stops = parts.setup, parts.time, parts.cost, parts.stops
        self._requests, self._job, self._result = parts.requests, parts.job, parts.result
        time, layers = parts.time, parts.setup.machine.layers
        self._queue: deque[_Enqueued] = deque()
        self._free_s = 0.0
        """When the device is through with it."""
        # The device is not stopped by what stops the host.
        self.accounts = Accounts(parts.cost, Clock(lambda: time.now, lambda: 0.0))
        self._underway = Underway(parts.cost, self.accounts, layers, lambda: time.now, parts.done)
        self._timeline = self._underway.timeline
        self.units: list[tuple[float, float]] = []
        """Begin and end of those of the last iteration."""

    def begins_at(self) -> float:
        """When the device is expected to begin with what is planned now."""
        return self._timeline.begins_at(self._time.now)

    @property
    def busy(self) -> bool:
        """Whether something is under way, although nothing is planned."""
        return bool(self._queue)

    def rest_until(self, at_s: float) -> None:
        """Nothing is to be done before, but to see what the device did."""
        if self._queue:
            self._time.now = max(self._time.now, min(at_s, self._queue[0].end_s))
            self._look()  # which may leave something to plan
        else:
            self._time.now = at_s
            self.accounts.rest()

    def run(self, plan: Plan, view: View) -> bool:
        """Launch an iteration, whose plan was made now, and its units as the device needs them, until it is time for
        the next plan; whether it was not dropped.
        """
        self.units[:] = [span for span in self.units if span[1] > self._time.now]
        self._plan(view)
        now = _Iteration(plan, view, passes=dict(self._job.passes))
        if plan.segments:
            self._forward(now)
        wait, backward = partial(self._wait, now), partial(self._backward, now)
        self._underway.enqueue_units(now, wait, lambda: self._interrupted, backward)
        self._underway.seal(now)
        self._wait(now, lambda: self._timeline.plan_at(self._time.now, needs_host=self._hosted))
        return not now.dropped

    @property
    def _hosted(self) -> bool:
        return self._setup.needs_host and bool(self._requests.running)

    # ---- the host ----

    def _plan(self, view: View) -> None:
        begun_s = self._time.now
        host = self._setup.machine.host
        assert host is not None
        self._time.spend(host.planning_s(len(view.sequences)))
        self._timeline.planned(self._time.now - begun_s)
        self._look()

    def _enqueue(self, owner: _Iteration, work: ForwardWork | UnitWork) -> _Enqueued:
        """Launch a forward or unit: the host's time goes on meanwhile, and the device begins with the first kernel."""
        machine, begun_s = self._setup.machine, self._time.now
        unit = work if isinstance(work, UnitWork) else None
        if isinstance(work, UnitWork):
            device_s, predicted_s = machine.unit_s(work), self._cost.unit_s(work)
        else:
            device_s, predicted_s = machine.forward_s(work), self._cost.forward_s(work)
        id = self._timeline.enqueue(predicted_s, begun_s, forward=unit is None)
        self._launch(machine.launch_s(work))
        start_s = max(begun_s, self._free_s)
        self._free_s = max(start_s + device_s * self._time.error(), self._time.now)
        self._queue.append(_Enqueued(id, owner, unit, start_s, self._free_s))
        owner.open += 1
        return self._queue[-1]

    def _launch(self, seconds: float) -> None:
        """Between two launches the host takes the marks that came: tokens do not wait for the last."""
        left_s = seconds
        while self._queue and self._queue[0].end_s < self._time.now + left_s:
            until_mark_s = max(0.0, self._queue[0].end_s - self._time.now)
            self._time.spend(until_mark_s)
            left_s -= until_mark_s
            self._look()
        self._time.spend(left_s)

    def _forward(self, now: _Iteration) -> None:
        now.enqueued = self._enqueue(now, now.plan.work)
        now.forward = now.enqueued.id
        for segment in now.plan.segments:
            if segment.kind is Kind.FINETUNE:
                self._job.window(segment)
        expected_s = self._timeline.end_of(now.forward, self._time.now)
        now.sampled = self._requests.launched(now.plan.segments, expected_s)

    def _backward(self, now: _Iteration, unit: Unit, work: UnitWork) -> None:
        enqueued = self._enqueue(now, work)
        self.units.append((enqueued.start_s, enqueued.end_s))
        self._result.longest_unit_s = max(self._result.longest_unit_s, enqueued.end_s - enqueued.start_s)
        self._job.backward(unit)

    @property
    def _interrupted(self) -> bool:
        return self._stops and self._requests.next_at <= self._time.now

    # ---- waiting for the device ----

    def _wait(self, now: _Iteration, until: Callable[[], float]) -> None:
        """Until the time that `until` says, which marks and arrivals may move."""
        while True:
            self._look()
            if self._interrupted:
                self._give_way(now)
            at_s = until()
            if at_s <= self._time.now:
                return
            if self._queue:
                at_s = min(at_s, self._queue[0].end_s)
            if self._stops and self._requests.next_at > self._time.now:
                at_s = min(at_s, self._requests.next_at)
            self._time.now = at_s

    def _give_way(self, now: _Iteration) -> None:
        """Drop what is left of a forward that serves nobody, but for the layers that are enqueued: these are a lead."""
        forward, time, layers = now.enqueued, self._time, self._setup.machine.layers
        if not self._queue or forward is not self._queue[-1] or now.dropped:
            return
        seconds = forward.end_s - forward.start_s
        layer = math.ceil(layers * (time.now + LEAD_S - forward.start_s) / seconds)
        if 0 < layer < layers and gives_way(now.plan, now.view, self._cost, layer / layers):
            now.dropped = True
            self._free_s = forward.end_s = forward.start_s + seconds * layer / layers
            self._timeline.shortened(forward.id, self._cost.forward_s(now.plan.work) * layer / layers)
            self._job.passes = now.passes

    def _look(self) -> None:
        """Take the marks of what is over."""
        while self._queue and self._queue[0].end_s <= self._time.now:
            done = self._queue.popleft()
            owner = done.owner
            if self._underway.over(owner, done.id, done.unit, done.start_s, done.end_s):
                assert owner.forwarded is not None  # it is over
                self._requests.seen(owner.sampled, self._time.now, finetuned=owner.forwarded.finetuned)
            self._underway.close(owner)
