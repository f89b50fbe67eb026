"""A run of an engine on a simulated machine: admit, view, decide, move the clock, commit, learn."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, replace

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.reserve import FixedReserve, Reserving
from coserve_engine.latency.work import UnitWork
from coserve_engine.scheduler.iteration import Accounts, Clock, Forwarded, run_units
from coserve_engine.scheduler.load import Demand, RequestLoad, saturation_percent
from coserve_engine.scheduler.pages import HEADROOM_PAGES
from coserve_engine.scheduler.plan import Kind, Plan, Policy, SequenceView, Unit, View
from coserve_engine.scheduler.schedule import decide, gives_way
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.jobs import Job
from coserve_engine.simulate.machine import Machine, calibrated
from coserve_engine.simulate.pauses import NONE, Pauses, Pausing
from coserve_engine.simulate.pool import PagePool
from coserve_engine.simulate.result import RequestTimes, Result
from coserve_engine.simulate.trace import Arrival

REPORT_S = 0.25


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine and its machine. `noise` is the standard deviation of log(actual / true) of each forward and unit."""

    machine: Machine
    ttft_s: float = 1.0
    tpot_s: float = 0.1
    noise: float = 0.05
    seed: int = 0
    max_slowdown: float | None = None
    max_requests: int = 64
    max_batch_tokens: int = 512
    kv_pages: int = 1024
    pass_tokens: int = 512
    sample_tokens: int | None = None
    """Of each sample in a pass; None: a pass is one sample."""
    max_window_rows: int | None = None
    passes_per_step: int = 4
    tile: int = 64
    page: int = 64
    pauses: Pauses = NONE


@dataclass(slots=True)
class _Request:
    """A request here, as it is seen; finished with `end` tokens of prompt and output."""

    view: SequenceView
    end: int
    times: RequestTimes
    finetune_s: float
    last_s: float | None = None
    pages: int = 0
    late_with_finetuning: int = 0
    """Gaps with finetuning in them that were longer than promised."""


class World:
    """`finetuning`: whether there is a job. Without `stops` no arrival ends units or a forward early (an ablation).
    With `reports` the result has the saturation that the engine would report.

    Pages go as in the engine (`serving.Serving.make_room`), but for the prefixes that requests share there: what the
    tokens of an arrival are, no trace says.
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
        self.setup, self.arrivals, self.policy = setup, arrivals, policy
        self.finetuning, self.stops, self.reports = finetuning, stops, reports
        self.now = 0.0
        self._next = 0
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._growing: deque[_Request] = deque()
        """Those whose next token needs a page more."""
        self._noise = random.Random(setup.seed)
        self._pausing = Pausing(setup.pauses, setup.seed)
        self._clock = Clock(lambda: self.now, lambda: self._pausing.total_s)
        self._reserve = reserve or FixedReserve(0.0)
        self._pool = PagePool(setup.kv_pages)
        self._job = Job(
            self._pool,
            setup.machine.layers,
            setup.tile,
            setup.page,
            setup.pass_tokens,
            setup.sample_tokens or setup.pass_tokens,
            setup.passes_per_step,
        )

    def run(self, seconds: float = math.inf) -> Result:
        """Until the last request is done, or for so long. Raises SimulationError for one that needs too many pages."""
        s = self.setup
        cost = calibrated(s.machine, s.tile, s.noise, self._noise)
        accounts = Accounts(cost, self._clock)
        result, plan_id, last_report = Result(s.ttft_s, s.tpot_s), 0, 0.0
        while self.now < seconds and (self._next < len(self.arrivals) or self._waiting or self._running):
            self._arrive(result, accounts)
            self._make_room()
            if self.finetuning:
                self._job.advance(may_open=not self._waiting)
            view = self._view()
            accounts.begin()
            plan = self.policy(view, cost, plan_id)
            plan_id += 1
            if not plan.segments and not plan.units:
                self._wait_for_the_next(accounts, result, seconds, idle_plans=not self._running)
                continue
            if plan.segments and not self._forward(plan, view, cost):
                accounts.rest()
                continue
            forwarded = accounts.forwarded(plan, view)
            self._commit(plan, forwarded)
            units = run_units(plan, view, cost, self._clock, forwarded, self._backward, self._interrupted)
            done = accounts.close(plan, view, forwarded, units, s.machine.layers)
            result.iteration(done)
            if done.excess_s is not None:
                self._reserve.observe(forwarded.end_s, done.excess_s, done.paused_s)
            self._spend(s.machine.turnaround_ms / 1e3)
            if self.reports and self.now - last_report >= REPORT_S:
                last_report = self.now
                result.saturation.append(saturation_percent(self._demand(accounts), cost, s.ttft_s, s.tpot_s, s.tile))
        result.seconds, result.finetune_tokens = self.now, self._job.progress_tokens
        return result

    def _forward(self, plan: Plan, view: View, cost: CostModel) -> bool:
        """Move the clock to the end of the forward, or of the layer in which it is dropped for an arrival; whether it
        came to its end.
        """
        layers, seconds = self.setup.machine.layers, self.setup.machine.forward_s(plan.work) * self._error()
        if self.stops and not view.sequences and self._next < len(self.arrivals):
            layer = math.ceil(layers * (self.arrivals[self._next].at_s - self.now) / seconds)
            if layer < layers and gives_way(plan, view, cost, layer / layers):
                self._spend(seconds * layer / layers)
                return False
        self._spend(seconds)
        return True

    def _spend(self, seconds: float) -> None:
        """Move the clock by work of so many seconds, and by the pauses in it."""
        self.now = self._pausing.after(self.now, seconds)

    def _error(self) -> float:
        return math.exp(self._noise.gauss(0.0, self.setup.noise))

    def _interrupted(self) -> bool:
        return self.stops and self._next < len(self.arrivals) and self.arrivals[self._next].at_s <= self.now

    def _wait_for_the_next(self, accounts: Accounts, result: Result, seconds: float, *, idle_plans: bool) -> None:
        if not idle_plans or self._next == len(self.arrivals):
            raise SimulationError("the policy plans nothing although requests are running")
        until = min(seconds, max(self.now, self.arrivals[self._next].at_s))
        if self.reports:
            result.saturation += [0.0] * int((until - self.now) / REPORT_S)
        self.now = until
        accounts.rest()

    def _arrive(self, result: Result, accounts: Accounts) -> None:
        while self._next < len(self.arrivals) and self.arrivals[self._next].at_s <= self.now:
            a = self.arrivals[self._next]
            self._next += 1
            times = RequestTimes(a.at_s)
            result.requests.append(times)
            view = SequenceView.of(self._next, 0, a.prompt, a.at_s, None, self.setup.ttft_s, self.setup.tpot_s)
            end = a.prompt + a.output
            if self._pages(end) > self._pool.total:
                raise SimulationError(f"a request of {end} tokens needs more than the {self._pool.total} KV pages")
            self._waiting.append(_Request(view, end, times, accounts.time.finetune_s))

    def _make_room(self) -> None:
        """Pages for those that run, oldest first, then for those that wait; passes give theirs up first, then the
        youngest request.
        """
        growing, preempted = self._growing, False
        while growing:
            request = growing.popleft()
            while request.pages and not self._pool.extend():
                if not self._job.drop_youngest():
                    self._preempt_youngest()
                    preempted = True
            request.pages += request.pages > 0
        if self._waiting and not preempted:
            self._admit()

    def _preempt_youngest(self) -> None:
        """It waits first in line and is computed again."""
        _, request = self._running.popitem()
        self._leave(request)
        request.view = request.view._replace(done=0)
        self._waiting.appendleft(request)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.setup.max_requests:
            request = self._waiting[0]
            pages = self._pages(request.view.known)
            lacking = self._pool.reserve(pages)
            if not lacking:
                request.pages = pages
                self._running[request.view.slot] = self._waiting.popleft()
                self._pool.headroom = HEADROOM_PAGES * len(self._running)
            elif lacking > self._job.held_pages or not self._job.drop_youngest():
                return

    def _leave(self, request: _Request) -> None:
        """It runs no more."""
        self._pool.give(request.pages)
        request.pages = 0
        self._pool.headroom = HEADROOM_PAGES * len(self._running)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.setup.page)

    def _view(self) -> View:
        s = self.setup
        return View(
            self.now,
            tuple([request.view for request in self._running.values()]),
            tuple(self._job.passes.values()),
            len(self._waiting),
            s.ttft_s,
            s.tpot_s,
            s.max_batch_tokens,
            s.tile,
            s.max_slowdown,
            reserve_s=self._reserve.seconds,
            max_window_rows=s.max_window_rows,
        )

    def _commit(self, plan: Plan, forwarded: Forwarded) -> None:
        s, now, finetune = self.setup, self.now, Kind.FINETUNE
        ttft_s, tpot_s, page = s.ttft_s, s.tpot_s, s.page
        for segment in plan.segments:
            kind, slot, start, length, sample = segment
            if kind is finetune:
                self._job.window(segment)
                continue
            request, done = self._running[slot], start + length
            if not sample:
                request.view = request.view._replace(done=done)
                continue
            arrival_s = request.view.arrival
            if request.last_s is None:
                request.times.first_s = now - arrival_s
            else:
                gap_s = now - request.last_s
                request.times.gaps_s.append(gap_s)
                request.late_with_finetuning += gap_s > tpot_s and forwarded.finetuned
            request.last_s = now
            request.view = SequenceView.of(slot, done, done + 1, arrival_s, now, ttft_s, tpot_s)
            if done + 1 >= request.end:
                del self._running[slot]
                self._leave(request)
                kept, bears = request.times.strict(ttft_s, tpot_s), len(request.times.gaps_s) // 100
                if kept or (request.times.first_s <= ttft_s and request.late_with_finetuning > bears):
                    self._reserve.judged(now - arrival_s, missed=not kept)
            elif done >= request.pages * page:
                self._growing.append(request)

    def _backward(self, unit: Unit, work: UnitWork) -> None:
        self._spend(self.setup.machine.unit_s(work) * self._error())
        self._job.backward(unit)

    def _demand(self, accounts: Accounts) -> Demand:
        requests = (
            RequestLoad(r.view.done, r.view.known, r.last_s is None, r.view.arrival, r.finetune_s)
            for r in (*self._running.values(), *self._waiting)
        )
        held_pages = sum(request.pages for request in self._running.values())
        return Demand.of(requests, self.now, accounts.time, held_pages, self._pool.total)


def alone_tokens_per_s(setup: Setup, seconds: float = 60.0) -> float:
    """Tokens a second of finetuning with nobody to serve."""
    far = [Arrival(seconds, 1, 1)]
    result = World(replace(setup, noise=0.0), far, decide).run(seconds)
    return result.finetune_tokens / result.seconds
