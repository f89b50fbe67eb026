"""A machine whose host computes itself, such as a CPU: what is run is over when the call returns."""

from __future__ import annotations

import math

from coserve_engine.latency.work import UnitWork
from coserve_engine.scheduler.iteration import Accounts, Clock, run_units
from coserve_engine.scheduler.plan import Kind, Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.simulate.parts import Parts


class AtOnce:
    """Runs plans one by one."""

    def __init__(self, parts: Parts) -> None:
        self._setup, self._time, self._cost, self._stops = parts.setup, parts.time, parts.cost, parts.stops
        self._requests, self._job, self._result, self._done = parts.requests, parts.job, parts.result, parts.done
        time = parts.time
        self._clock = Clock(lambda: time.now, lambda: time.paused_s)
        self.accounts = Accounts(parts.cost, self._clock)
        self.units: list[tuple[float, float]] = []
        """Begin and end of those of the last iteration."""

    def begins_at(self) -> float:
        """When what is planned now begins."""
        return self._time.now

    @property
    def busy(self) -> bool:
        """Whether something is under way, although nothing is planned."""
        return False

    def rest_until(self, at_s: float) -> None:
        """Nothing is to be done before."""
        self._time.now = at_s
        self.accounts.rest()

    def run(self, plan: Plan, view: View) -> bool:
        """An iteration, and the turnaround after it; whether it was not dropped."""
        self.accounts.begin()
        self.units.clear()
        if plan.segments and not self._forward(plan, view):
            self.accounts.rest()
            return False
        forwarded = self.accounts.forwarded(plan, view)
        for segment in plan.segments:
            if segment.kind is Kind.FINETUNE:
                self._job.window(segment)
        now = self._time.now
        sampled = self._requests.launched(plan.segments, now)
        self._requests.seen(sampled, now, finetuned=forwarded.finetuned)
        units = run_units(plan, view, self._cost, self._clock, forwarded, self._backward, self._interrupted)
        layers = self._setup.machine.layers
        self._done(self.accounts.close(plan, view, forwarded, units, layers), forwarded)
        self._time.spend(self._setup.machine.turnaround_ms / 1e3)
        return True

    def _forward(self, plan: Plan, view: View) -> bool:
        """Move the clock to the end of the forward, or of the layer in which it is dropped for an arrival; whether it
        came to its end.
        """
        layers, seconds = self._setup.machine.layers, self._setup.machine.forward_s(plan.work) * self._time.error()
        if self._stops and not view.sequences and self._requests.next_at < math.inf:
            layer = math.ceil(layers * (self._requests.next_at - self._time.now) / seconds)
            if layer < layers and gives_way(plan, view, self._cost, layer / layers):
                self._time.spend(seconds * layer / layers)
                return False
        self._time.spend(seconds)
        return True

    def _interrupted(self) -> bool:
        return self._stops and self._requests.next_at <= self._time.now

    def _backward(self, unit: Unit, work: UnitWork) -> None:
        begun_s = self._time.now
        self._time.spend(self._setup.machine.unit_s(work) * self._time.error())
        self.units.append((begun_s, self._time.now))
        self._result.longest_unit_s = max(self._result.longest_unit_s, self._time.now - begun_s)
        self._job.backward(unit)
