"""Iterations on a device whose work is over when the call returns, such as a CPU: forward, tokens, then units by the
clock.
"""

from __future__ import annotations

from coserve_engine.latency.work import UnitWork
from coserve_engine.messages import Token
from coserve_engine.running.parts import Emit, Interrupted, Parts
from coserve_engine.scheduler.iteration import Accounts, Clock, run_units
from coserve_engine.scheduler.plan import Plan, Unit, View
from coserve_engine.scheduler.schedule import gives_way
from coserve_engine.serving.serving import Flight


class AtOnce:
    """Runs plans one by one."""

    def __init__(self, parts: Parts, clock: Clock) -> None:
        self._parts, self._clock = parts, clock
        self.accounts = Accounts(parts.cost, clock)
        self.busy = False
        """Never: nothing is under way between two iterations."""

    def begin(self, now: float) -> float:
        """A step begins; when what it plans will."""
        self.accounts.begin()
        return now

    def rest(self, emit: Emit | None) -> None:
        """Nothing was planned."""
        self.accounts.rest()

    def run(self, plan: Plan, view: View, interrupted: Interrupted, emit: Emit | None) -> None:
        """An iteration, unless its forward is dropped for a request that comes."""
        parts = self._parts
        tokens: tuple[Token, ...] = ()
        if plan.segments:

            def goes_on(layer: int) -> bool:
                return not (gives_way(plan, view, parts.cost, layer / parts.layers) and interrupted())

            computed = parts.executor.forward(plan.segments, parts.serving.requests.running, goes_on)
            if computed is None:
                self.accounts.rest()
                return
            parts.charge(plan)
            rows = parts.serving.launched(plan.segments, view.now)
            sampled = parts.executor.sample(computed, parts.serving.masks(rows))
            events, tokens = parts.serving.commit(Flight(rows, sampled), self._clock.now)
            parts.events.extend(events)
        forwarded = self.accounts.forwarded(plan, view)
        parts.emission(tokens, forwarded, plan)
        if plan.units and emit is not None and parts.events:
            emit(parts.taken())  # a client sees a token when it is there, not when the units are done
        units = run_units(plan, view, parts.cost, self._clock, forwarded, self._backward, interrupted)
        parts.events.append(self.accounts.close(plan, view, forwarded, units, parts.layers))

    def _backward(self, unit: Unit, work: UnitWork) -> None:
        self._parts.backward(unit, work.rows)
