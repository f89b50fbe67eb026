"""What both ways to run a plan on a simulated machine are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coserve_engine.latency.cost import CostModel
from coserve_engine.messages import IterationDone
from coserve_engine.scheduler.iteration import Forwarded
from coserve_engine.simulate.jobs import Job
from coserve_engine.simulate.requests import Requests
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.setup import Setup, Time


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one run. `done` takes what came of each iteration; without `stops` no arrival ends units or a forward."""

    setup: Setup
    time: Time
    cost: CostModel
    requests: Requests
    job: Job
    result: Result
    done: Callable[[IterationDone, Forwarded], None]
    stops: bool
