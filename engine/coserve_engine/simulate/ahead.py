"""A machine whose device computes behind the host, such as a GPU: the host plans and launches, and learns of what the
device did by its marks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork, UnitWork
from coserve_engine.messages import IterationDone
from coserve_engine.scheduler.finetuning import fitting_unit
from coserve_engine.scheduler.iteration import Accounts, Clock, Forwarded, Units, UnitTimes
from coserve_engine.scheduler.plan import Kind, PassView, Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.scheduler.timeline import LEAD_S, Timeline
from coserve_engine.simulate.jobs import Job
from coserve_engine.simulate.requests import Request, Requests
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.setup import Setup, Time


@dataclass(slots=True)
class _Iteration:
    """One of which not all is over. `sealed`: no unit will be added; `dropped`: its forward was, so it leaves no trace;
    `passes`: as they stood before.
    """

    plan: Plan
    view: View
    passes: dict[int, PassView]
    forward: _Enqueued | None = None
    sampled: list[Request] = field(default_factory=list)
    forwarded: Forwarded | None = None
    times: UnitTimes = field(default_factory=list)
    open: int = 0
    """Of its forward and units, how many are not over."""
    end_s: float = 0.0
    sealed: bool = False
    dropped: bool = False


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
    """Runs plans, each until the next is to be made. `done` takes what came of each; without `stops` no arrival ends
    units or a forward.
    """

    def __init__(
        self,
        setup: Setup,
        time: Time,
        cost: CostModel,
        requests: Requests,
        job: Job,
        result: Result,
        done: Callable[[IterationDone, Forwarded], None],
        *,
        stops: bool,
    ) -> None:
        self._setup, self._time, self._cost, self._stops = setup, time, cost, stops
        self._requests, self._job, self._result, self._done = requests, job, result, done
        self._timeline = Timeline()
        self._queue: deque[_Enqueued] = deque()
        self._free_s = 0.0
        """When the device is through with it."""
        self._iterations: deque[_Iteration] = deque()
        # The device is not stopped by what stops the host.
        self.accounts = Accounts(cost, Clock(lambda: time.now, lambda: 0.0))
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
        now = _Iteration(plan, view, dict(self._job.passes))
        self._iterations.append(now)
        if plan.segments:
            self._forward(now)
        self._units(now)
        now.sealed = True
        self._close(now)
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
        now.forward = self._enqueue(now, now.plan.work)
        for segment in now.plan.segments:
            if segment.kind is Kind.FINETUNE:
                self._job.window(segment)
        expected_s = self._timeline.end_of(now.forward.id, self._time.now)
        now.sampled = self._requests.launched(now.plan.segments, expected_s)

    def _units(self, now: _Iteration) -> None:
        """Enqueue units one by one, until one does not fit or a request comes; the first that does not is shortened."""
        cost, time, timeline, plan = self._cost, self._time, self._timeline, now.plan
        begun_s = self.begins_at()
        for planned in plan.units:
            shape = self._job.passes[planned.pass_id].shape
            self._wait_for_unit(now, cost.unit_s(shape.backward(*planned[1:])))
            if self._interrupted:
                return
            if now.forwarded is not None:
                begun_s = now.forwarded.end_s
            elif now.forward is not None:
                begun_s = timeline.end_of(now.forward.id, time.now)
            end_s = min(plan.until, begun_s + plan.units_s)
            unit = fitting_unit(planned, shape, cost, end_s - timeline.free_at(time.now))
            if unit is None:
                return
            self._backward(now, unit)
            if unit is not planned:
                return

    def _wait_for_unit(self, now: _Iteration, unit_s: float) -> None:
        timeline, time = self._timeline, self._time
        self._wait(now, lambda: -math.inf if self._interrupted else timeline.unit_at(time.now, unit_s))

    def _backward(self, now: _Iteration, unit: Unit) -> None:
        shape = self._job.passes[unit.pass_id].shape
        enqueued = self._enqueue(now, shape.backward(*unit[1:]))
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
        forward, time, layers = now.forward, self._time, self._setup.machine.layers
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
            self._timeline.started(done.id, done.start_s)
            span = self._timeline.ended(done.id, done.end_s)
            owner.open, owner.end_s = owner.open - 1, done.end_s
            if owner.dropped:
                self.accounts.rest()
            elif owner.forwarded is None:
                self._forwarded(owner, (span.start_s, span.end_s if done.unit is None else span.start_s))
            if done.unit is not None:
                owner.times.append((done.unit, span.seconds))
            self._close(owner)

    def _forwarded(self, owner: _Iteration, span: tuple[float, float]) -> None:
        owner.forwarded = self.accounts.forwarded(owner.plan, owner.view, span)
        self._requests.seen(owner.sampled, self._time.now, finetuned=owner.forwarded.finetuned)

    def _close(self, owner: _Iteration) -> None:
        """Keep the books of an iteration that is over."""
        if owner.open or not owner.sealed:
            return
        self._iterations.remove(owner)
        if owner.forwarded is not None:
            units = Units(owner.times, owner.end_s, 0.0)
            layers = self._setup.machine.layers
            done = self.accounts.close(owner.plan, owner.view, owner.forwarded, units, layers)
            self._done(done, owner.forwarded)
