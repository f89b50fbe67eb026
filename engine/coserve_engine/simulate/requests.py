"""The requests of a run: who waits, who has a place and pages, and what each sees of its tokens.

Pages go as in the engine (`serving.Serving.make_room`), but for the prefixes that requests share there: what the tokens
of an arrival are, no trace says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from coserve_engine.latency.reserve import Reserving
from coserve_engine.scheduler.load import Demand, RequestLoad, ServingTime
from coserve_engine.scheduler.pages import HEADROOM_PAGES
from coserve_engine.scheduler.plan import Kind, Segment, SequenceView
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.jobs import Job
from coserve_engine.simulate.pool import PagePool
from coserve_engine.simulate.result import RequestTimes, Result
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival


@dataclass(slots=True)
class Request:
    """A request here, as the next plan sees it; finished with `end` tokens of prompt and output, which nobody knows
    before its last token is seen.
    """

    view: SequenceView
    end: int
    times: RequestTimes
    finetune_s: float
    last_s: float | None = None
    """When its last token was seen."""
    launched_s: float | None = None
    """When that of the last forward that gives it one is expected, or was seen."""
    unseen: int = 0
    """Tokens of forwards whose outcome is unknown."""
    seen: int = 0
    """Tokens, those of the prompt among them, whose outcome is known."""
    pages: int = 0
    late_with_finetuning: int = 0
    """Gaps with finetuning in them that were longer than promised."""


class Requests:
    """Those of `arrivals` that have come."""

    def __init__(
        self, setup: Setup, arrivals: list[Arrival], pool: PagePool, job: Job, reserve: Reserving, result: Result
    ) -> None:
        self._setup, self._arrivals, self._pool, self._job = setup, arrivals, pool, job
        self._reserve, self._result = reserve, result
        self._next = 0
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._growing: deque[Request] = deque()
        """Those whose next token needs a page more."""

    @property
    def left(self) -> bool:
        """Whether one is here or will come."""
        return bool(self._next < len(self._arrivals) or self.waiting or self.running)

    @property
    def next_at(self) -> float:
        """When the next one comes."""
        return self._arrivals[self._next].at_s if self._next < len(self._arrivals) else math.inf

    def arrive(self, now: float, time: ServingTime, units: Sequence[tuple[float, float]]) -> None:
        """Take in those that have come until now, beside units that begin and end then: what of them lies after an
        arrival, that request waits for.
        """
        s = self._setup
        while self._next < len(self._arrivals) and self._arrivals[self._next].at_s <= now:
            a = self._arrivals[self._next]
            self._next += 1
            times = RequestTimes(a.at_s)
            self._result.requests.append(times)
            waited_s = sum([max(0.0, end_s - max(begun_s, a.at_s)) for begun_s, end_s in units])
            self._result.unit_wait_s = max(self._result.unit_wait_s, waited_s)
            view = SequenceView.of(self._next, 0, a.prompt, a.at_s, None, s.ttft_s, s.tpot_s, s.needs_host)
            end = a.prompt + a.output
            if self._pages(end) > self._pool.total:
                raise SimulationError(f"a request of {end} tokens needs more than the {self._pool.total} KV pages")
            self.waiting.append(Request(view, end, times, time.finetune_s))

    def views(self) -> tuple[SequenceView, ...]:
        """Of those that run."""
        return tuple([request.view for request in self.running.values()])

    # ---- pages ----

    def make_room(self) -> None:
        """Pages for those that run, oldest first, then for those that wait; passes give theirs up first, then the
        youngest request.
        """
        growing, preempted = self._growing, False
        while growing:
            request = growing.popleft()
            while request.pages and not self._pool.extend():
                if not self._job.drop_youngest():
                    self.preempt_youngest()
                    preempted = True
            request.pages += request.pages > 0
        if self.waiting and not preempted:
            self._admit()

    def preempt_youngest(self) -> None:
        """It waits first in line and is computed again."""
        _, request = self.running.popitem()
        self._leave(request)
        request.view = request.view._replace(done=0)
        self.waiting.appendleft(request)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._setup.max_requests:
            request = self.waiting[0]
            pages = self._pages(request.view.known)
            lacking = self._pool.reserve(pages)
            if not lacking:
                request.pages = pages
                self.running[request.view.slot] = self.waiting.popleft()
                self._pool.headroom = HEADROOM_PAGES * len(self.running)
            elif lacking > self._job.held_pages or not self._job.drop_youngest():
                return

    def _leave(self, request: Request) -> None:
        """It runs no more."""
        self._pool.give(request.pages)
        request.pages = 0
        self._pool.headroom = HEADROOM_PAGES * len(self.running)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._setup.page)

    # ---- tokens ----

    def launched(self, segments: Sequence[Segment], at_s: float) -> list[Request]:
        """These rows are computed; their tokens are expected at `at_s`. Returns those that get one. A row of a request
        that has ended since it was planned is computed for nobody.
        """
        s, finetune, sampled = self._setup, Kind.FINETUNE, []
        for kind, slot, start, length, sample in segments:
            if kind is finetune or slot not in self.running:
                continue
            request, done = self.running[slot], start + length
            if not sample:
                request.view = request.view._replace(done=done)
                continue
            view = request.view
            request.view = SequenceView.of(
                slot, done, done + 1, view.arrival, at_s, s.ttft_s, s.tpot_s, view.needs_host
            )
            request.launched_s = at_s
            request.unseen += 1
            sampled.append(request)
            if done >= request.pages * s.page:
                self._growing.append(request)
        return sampled

    def seen(self, sampled: list[Request], now: float, *, finetuned: bool) -> None:
        """The tokens of a forward are known; those that have ended leave."""
        s = self._setup
        for request in sampled:
            request.unseen -= 1
            if request.seen >= request.end:
                continue  # it ended a token before: this one is thrown away
            view, arrival_s = request.view, request.times.arrival_s
            known = view.known - request.unseen
            request.seen = known
            if request.last_s is None:
                request.times.first_s = now - arrival_s
            else:
                gap_s = now - request.last_s
                request.times.gaps_s.append(gap_s)
                request.late_with_finetuning += gap_s > s.tpot_s and finetuned
            request.last_s = now
            if known >= request.end:
                self._end(request, now)
            elif not request.unseen and request.launched_s != now:
                request.view = view._replace(deadline=now + s.tpot_s)

    def _end(self, request: Request, now: float) -> None:
        s = self._setup
        if request.view.slot in self.running:
            del self.running[request.view.slot]
            self._leave(request)
        else:
            self.waiting.remove(request)  # put out while its last token was computed
        kept, bears = request.times.strict(s.ttft_s, s.tpot_s), len(request.times.gaps_s) // 100
        if kept or (request.times.first_s <= s.ttft_s and request.late_with_finetuning > bears):
            self._reserve.judged(now - request.view.arrival, missed=not kept)

    def demand(self, now: float, time: ServingTime) -> Demand:
        """What inference needs as of now."""
        requests = (
            RequestLoad(r.view.done, r.view.known, r.last_s is None, r.view.arrival, r.finetune_s)
            for r in (*self.running.values(), *self.waiting)
        )
        held_pages = sum(request.pages for request in self.running.values())
        return Demand.of(requests, now, time, held_pages, self._pool.total)
