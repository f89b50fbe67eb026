"""What a replay saw: what its users got, with and without the machine's pauses, and what the engine learned.

A machine pauses for another process or another guest of its host. No plan foresees that, so a replay tells such time
apart; what the engine does about it is the learnt reserve.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from coserve_engine.engine import Engine
from coserve_engine.latency.pauses import PauseClock
from coserve_engine.latency.reserve import Reserve
from coserve_engine.messages import Event, IterationDone, TokenBatch
from coserve_engine.simulate.machine import ForwardCost, LinearMachine, UnitCost, machine_of
from coserve_engine.simulate.pauses import Pauses as MeasuredPauses
from coserve_engine.simulate.result import RequestTimes, Result

PAUSE_S = 1e-3
"""Below it a pause is noise."""


@dataclass(frozen=True)
class Late:
    """An iteration that ended so long after its bound, with pauses of `pause_s` in it."""

    by_s: float
    pause_s: float

    def __str__(self) -> str:
        return f"{1e3 * self.by_s:.1f} ms late with a pause of {1e3 * self.pause_s:.1f} ms"


class Pauses:
    """Those of this thread, since this was made."""

    def __init__(self, clock: PauseClock) -> None:
        self.seconds: list[float] = []
        self._clock, self._last_s = clock, clock()

    def look(self) -> float:
        """Seconds of all pauses until now."""
        now_s = self._clock()
        pause_s, self._last_s = now_s - self._last_s, now_s
        if pause_s > PAUSE_S:
            self.seconds.append(pause_s)
        return self.total_s

    @property
    def total_s(self) -> float:
        """Of all pauses until the last look."""
        return sum(self.seconds)


class Users:
    """What users see by one clock. `late` are those who waited too long in a gap with finetuning."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        self.result = Result(ttft_s, tpot_s)
        self.late: set[str] = set()
        self._times: dict[str, RequestTimes] = {}
        self._last_s: dict[str, float] = {}

    def arrive(self, name: str, at_s: float) -> None:
        """A request came."""
        self._times[name] = RequestTimes(at_s)
        self.result.requests.append(self._times[name])

    def token(self, name: str, at_s: float, *, finetuned: bool) -> None:
        """A request got a token; `finetuned`: with finetuning since the one before."""
        times, last_s = self._times[name], self._last_s.get(name)
        if last_s is None:
            times.first_s = at_s - times.arrival_s
        else:
            times.gaps_s.append(at_s - last_s)
            if finetuned and at_s - last_s > self.result.tpot_s:
                self.late.add(name)
        self._last_s[name] = at_s

    def judge(self, name: str, at_s: float, reserve: Reserve) -> None:
        """A request has ended."""
        times = self._times[name]
        kept = times.strict(self.result.ttft_s, self.result.tpot_s)
        if kept or name in self.late:
            reserve.judged(at_s - times.arrival_s, missed=not kept)


@dataclass
class Run:
    """What came out of the engine since this run began, for users and, by a clock that stands still in pauses, for
    users of a `quiet` machine.
    """

    users: Users
    quiet: Users
    left: int
    """Requests that are not done."""
    pauses: Pauses
    reserve: Reserve
    late: list[Late] = field(default_factory=list)
    learned: list[LinearMachine] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    reserves: list[float] = field(default_factory=list)
    """The reserve after each gap with finetuning, in seconds."""
    _began_paused_s: float = 0.0

    @property
    def result(self) -> Result:
        return self.users.result

    @property
    def machine(self) -> LinearMachine:
        """The mean of what was learned."""
        forward = ForwardCost(*map(statistics.mean, zip(*(m.forward for m in self.learned), strict=True)))
        unit, head = (
            UnitCost(*map(statistics.mean, zip(*(getattr(m, part) for m in self.learned), strict=True)))
            for part in ("unit", "head")
        )
        turnaround_ms = statistics.mean(m.turnaround_ms for m in self.learned)
        return LinearMachine(forward, unit, head, self.learned[0].layers, turnaround_ms)

    @property
    def late_alone_percent(self) -> float:
        """Iterations over their bound that no pause explains."""
        return 100.0 * sum(late.by_s > late.pause_s for late in self.late) / max(1, self.result.iterations)

    def missed_said(self) -> str:
        """Whose promise was missed, and by what."""
        ttft_s, tpot_s = self.result.ttft_s, self.result.tpot_s
        missed = [times for times in self.result.requests if not times.strict(ttft_s, tpot_s)]
        first = sum(times.first_s > ttft_s for times in missed)
        gap_ms = self.result.gap_ms(100)
        return f"late first token: {first} requests; only later: {len(missed) - first}; longest gap {gap_ms:.0f} ms"

    def pauses_said(self) -> str:
        """How much the machine paused."""
        seconds = self.pauses.seconds
        percent, longest_ms = 100 * self.pauses.total_s / self.result.seconds, 1e3 * max(seconds, default=0.0)
        over = f"{len(seconds)} pauses of over {1e3 * PAUSE_S:.0f} ms"
        return f"{over}, {percent:.2f} % of the time, {longest_ms:.0f} ms at most"

    def reserve_said(self) -> str:
        """What was kept free."""
        ranked = sorted(1e3 * seconds for seconds in self.reserves) or [0.0]
        return f"reserve {ranked[len(ranked) // 2]:.0f} ms in the middle, {ranked[0]:.0f} to {ranked[-1]:.0f} ms"

    def measured_pauses(self) -> MeasuredPauses:
        """As the simulator takes them."""
        ms = tuple(round(1e3 * seconds, 1) for seconds in self.pauses.seconds)
        return MeasuredPauses(len(ms) / max(1e-9, self.result.seconds - self.pauses.total_s), ms)

    def learn(self, engine: Engine) -> None:
        """Look at what the engine has learned of its machine."""
        self.learned.append(machine_of(engine.cost, engine.executor.model.layers))
        self.noises.append(engine.cost.forward_noise)

    def arrive(self, name: str, at_s: float) -> None:
        """A request came."""
        self.users.arrive(name, at_s)
        self.quiet.arrive(name, at_s - self.pauses.total_s)

    def begin(self) -> None:
        """An iteration begins."""
        self._began_paused_s = self.pauses.look()

    def take(self, events: list[Event]) -> None:
        """The engine has just given these."""
        paused_s = self.pauses.look()
        for event in events:
            if isinstance(event, IterationDone):
                self.result.iteration(event)
                by_s = event.started_s + event.duration_s - event.until_s
                if by_s > 0:
                    self.late.append(Late(by_s, paused_s - self._began_paused_s))
                if event.excess_s is not None:
                    self.reserve.observe(event.started_s + event.duration_s, event.excess_s, event.paused_s)
                    self.reserves.append(self.reserve.seconds)
                self.result.finetune_tokens += event.finetune_tokens / 3 + 2 * event.backward_tokens / 3
            elif isinstance(event, TokenBatch):
                finetuned = event.emission.finetuned
                for token in event.tokens:
                    self.users.token(token.request_id, token.emitted_s, finetuned=finetuned)
                    self.quiet.token(token.request_id, token.emitted_s - paused_s, finetuned=finetuned)
                    if token.finish is not None:
                        self.left -= 1
                        self.users.judge(token.request_id, token.emitted_s, self.reserve)
