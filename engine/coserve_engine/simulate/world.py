"""A run of an engine on a simulated machine: admit, view, decide, move the clock, commit, learn."""

from __future__ import annotations

import math
from dataclasses import replace

from coserve_engine.latency.reserve import FixedReserve, Reserving
from coserve_engine.messages import IterationDone
from coserve_engine.scheduler.iteration import Forwarded
from coserve_engine.scheduler.load import saturation_percent
from coserve_engine.scheduler.plan import Policy, View
from coserve_engine.scheduler.schedule import decide
from coserve_engine.simulate.ahead import Ahead
from coserve_engine.simulate.at_once import AtOnce
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.jobs import Job
from coserve_engine.simulate.machine import calibrated
from coserve_engine.simulate.parts import Parts
from coserve_engine.simulate.pool import PagePool
from coserve_engine.simulate.requests import Requests
from coserve_engine.simulate.result import Result
from coserve_engine.simulate.setup import Setup, Time
from coserve_engine.simulate.trace import Arrival

REPORT_S = 0.25


class World:
    """`finetuning`: whether there is a job. Without `stops` no arrival ends units or a forward early (an ablation).
    With `reports` the result has the saturation that the engine would report.
    """

    def __init__(
        self,
        setup: Setup,
        arrivals: list[Arrival],
        policy: Policy,
        *,
        finetuning: bool = True,
        stops: bool = True,
        reports: bool = False,
        reserve: Reserving | None = None,
    ) -> None:
        self.setup, self.policy = setup, policy
        self.finetuning, self.reports = finetuning, reports
        self.pool = PagePool(setup.kv_pages)
        self.result = Result(setup.ttft_s, setup.tpot_s)
        self._reserve = reserve or FixedReserve(0.0)
        self._time = Time(setup)
        self._job = Job(
            self.pool,
            setup.machine.layers,
            setup.tile,
            setup.page,
            setup.pass_tokens,
            setup.sample_tokens or setup.pass_tokens,
            setup.passes_per_step,
        )
        self.requests = Requests(setup, arrivals, self.pool, self._job, self._reserve, self.result)
        self._cost = calibrated(setup.machine, setup.tile, setup.noise, self._time.noise)
        kind = AtOnce if setup.machine.host is None else Ahead
        self._machine: AtOnce | Ahead = kind(
            Parts(setup, self._time, self._cost, self.requests, self._job, self.result, self._closed, stops)
        )

    @property
    def finetuned_tokens(self) -> float:
        """Until now."""
        return self._job.progress_tokens

    def run(self, seconds: float = math.inf) -> Result:
        """Until the last request is done, or for so long. Raises SimulationError for one that needs too many pages."""
        s, machine, requests, time = self.setup, self._machine, self.requests, self._time
        accounts, plan_id, last_report = machine.accounts, 0, 0.0
        while time.now < seconds and requests.left:
            requests.arrive(time.now, accounts.time, machine.units)
            requests.make_room()
            if self.finetuning:
                self._job.advance(may_open=not requests.waiting)
            view = self._view()
            plan = self.policy(view, self._cost, plan_id)
            plan_id += 1
            if not plan.segments and not plan.units:
                self._rest(seconds)
            elif machine.run(plan, view) and self.reports and time.now - last_report >= REPORT_S:
                last_report = time.now
                demand = requests.demand(time.now, accounts.time)
                self.result.saturation.append(saturation_percent(demand, self._cost, s.ttft_s, s.tpot_s, s.tile))
        self.result.seconds, self.result.finetune_tokens = time.now, self._job.progress_tokens
        return self.result

    def _closed(self, done: IterationDone, forwarded: Forwarded) -> None:
        """An iteration is over."""
        self.result.iteration(done)
        if done.excess_s is not None:
            self._reserve.observe(forwarded.end_s, done.excess_s, done.paused_s)

    def _rest(self, seconds: float) -> None:
        """Nothing is planned: until the next request comes."""
        if not self._machine.busy and (self.requests.running or self.requests.next_at == math.inf):
            raise SimulationError("the policy plans nothing although requests are running")
        until = min(seconds, max(self._time.now, self.requests.next_at))
        if self.reports:
            self.result.saturation += [0.0] * int((until - self._time.now) / REPORT_S)
        self._machine.rest_until(until)

    def _view(self) -> View:
        s = self.setup
        return View(
            self._machine.begins_at(),
            self.requests.views(),
            tuple(self._job.passes.values()),
            len(self.requests.waiting),
            s.ttft_s,
            s.tpot_s,
            s.max_batch_tokens,
            s.tile,
            s.max_slowdown,
            reserve_s=self._reserve.seconds,
            max_window_rows=s.max_window_rows,
        )


def alone_tokens_per_s(setup: Setup, seconds: float = 60.0) -> float:
    """Tokens a second of finetuning with nobody to serve."""
    far = [Arrival(seconds, 1, 1)]
    result = World(replace(setup, noise=0.0), far, decide).run(seconds)
    return result.finetune_tokens / result.seconds
