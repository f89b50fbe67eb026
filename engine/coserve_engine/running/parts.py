"""What both ways to run a plan are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coserve_engine.latency.cost import CostModel
from coserve_engine.messages import Emission, Event, Token, TokenBatch
from coserve_engine.model.executor import Executor
from coserve_engine.scheduler.iteration import Forwarded
from coserve_engine.scheduler.plan import Kind, Plan, Unit
from coserve_engine.serving.serving import Serving
from coserve_engine.training.job_table import JobTable

Emit = Callable[[list[Event]], None]
Interrupted = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one engine. `events` are what came of it and was not taken yet."""

    executor: Executor
    serving: Serving
    jobs: JobTable
    cost: CostModel
    events: list[Event]

    @property
    def layers(self) -> int:
        return self.executor.model.layers

    def charge(self, plan: Plan) -> None:
        """To their jobs, the windows of a plan."""
        for segment in plan.segments:
            if segment.kind is Kind.FINETUNE:
                self.jobs.charge(segment.slot, segment.length * self.layers)

    def backward(self, unit: Unit, rows: int) -> None:
        """A unit of so many rows."""
        self.executor.backward(unit)
        self.jobs.charge(unit.pass_id, rows)

    def emission(self, tokens: tuple[Token, ...], forwarded: Forwarded, plan: Plan) -> None:
        """The tokens of a forward, if there are any, are an event."""
        if tokens:
            emission = Emission(forwarded.late_s, forwarded.pauses_s, forwarded.finetuned, plan.work.prefill > 0)
            self.events.append(TokenBatch(tokens, emission))

    def taken(self) -> list[Event]:
        """The events, which are the taker's now."""
        events = list(self.events)
        self.events.clear()
        return events
