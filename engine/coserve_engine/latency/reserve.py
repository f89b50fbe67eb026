"""How much of the time between two tokens stays free for what no plan foresees: the machine's pauses, and the way to
the client.

A plan says until when a token is to leave; the excess is how much later it did. Excesses of the last minutes are
remembered, of each half second the highest. If they go on as they came, the chance that the next one is the highest of
H seconds is (mean interval between two) / H: a reserve that covers the highest is missed once in H seconds, whatever
their distribution. A miss costs its promise to who runs just then, so the share of requests that miss it is (how long
one lasts) / H. From the share that may follows H, and in it how many excesses the reserve need not cover; where that is
less than one, it goes beyond the highest by the distances of those below it. Attainment moves that number.

Time here is time in which gaps with finetuning are seen, and only those count: what serving alone makes late (overload,
loading, queueing) no reserve would mend, and it leaves this as it was.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

BLOCK_S = 0.5
"""Excesses so close are one."""
LONGEST_GAP_S = 1.0
"""Longer without a gap: nothing was seen meanwhile."""
LEAST_SHARE, MOST_SHARE = 0.01, 0.6
"""Of the time per output token that is kept free at least, and at most: a job is to go on."""
NOISE_SHARE = 0.01
"""Of it, an excess that is not worth remembering."""
START_SHARE, START_S = MOST_SHARE, 600.0
"""What is kept free at least before much was seen; it fades over so many seconds."""
LOOK_S, RARE = 20.0, 12.0
"""After so many seconds no more than so many times the highest excess, or the longest pause: a still machine stays
still, while on others the first rare excess is some ten times what came all the time, and pauses that short work hid
come in long work too.
"""
SHORTEST_S, LONGEST_S = 30.0, 600.0
"""How long an excess is remembered at least and at most."""
SAFETY = 4.0
"""Aim for so many times fewer misses than may be: not all of them can be seen here."""
SILENCE = 1e-3
"""What caused high excesses has ended once a silence as long as this one is less likely, were they still to come."""
TOP, BEYOND = 3, 1.5
"""From so many distances between the highest follows how far the next may lie above them: up to so many of these."""
START_LIFE_S, LIFE_GAIN = 5.0, 0.02
MOST_TRUST, TRUST_STEP = 0.7, 0.05


class Reserving(Protocol):
    """What keeps some seconds of each gap free."""

    @property
    def seconds(self) -> float: ...

    def observe(self, at_s: float, excess_s: float, paused_s: float = 0.0) -> None: ...

    def judged(self, life_s: float, *, missed: bool) -> None: ...


class Reserve:
    """The learnt reserve for a promise of `tpot_s` that `percentile` percent of requests must attain; `least_share` of
    it is for what is not seen here.
    """

    def __init__(self, tpot_s: float, percentile: float, least_share: float = LEAST_SHARE) -> None:
        self._tpot_s, self._least_s, self._most_s = tpot_s, least_share * tpot_s, MOST_SHARE * tpot_s
        self._may_miss = max(1e-3, 1.0 - percentile / 100) / SAFETY
        self._events: deque[tuple[float, float]] = deque()
        """(second seen, highest excess) of each block that had one worth it."""
        self._last_at_s = -math.inf
        self._longest_pause_s = 0.0
        self._seen_s = 0.0
        self._renew_s = 0.0
        self._life_s = START_LIFE_S
        self._trust = 0.0
        """Log of how many times more misses are borne than `_may_miss`, since fewer came."""
        self.seconds = START_SHARE * tpot_s
        """To keep free as of now."""

    def observe(self, at_s: float, excess_s: float, paused_s: float = 0.0) -> None:
        """A gap with finetuning in it ended at `at_s`, so much later than planned (earlier, where negative), with so
        many seconds of the machine's pauses in it, as far as they are known.
        """
        self._longest_pause_s = max(self._longest_pause_s, paused_s)
        self._seen_s += min(LONGEST_GAP_S, max(0.0, at_s - self._last_at_s))
        self._last_at_s = max(at_s, self._last_at_s)
        if NOISE_SHARE * self._tpot_s < excess_s <= self._most_s:  # what no reserve can cover is no reason for one
            self._remember(excess_s)
        if self._seen_s >= self._renew_s:
            self._renew_s = self._seen_s + BLOCK_S
            self._forget()
            self.seconds = min(self._most_s, max(self._start_s, self._least_s + self._needed_s()))

    def judged(self, life_s: float, *, missed: bool) -> None:
        """A request that lasted `life_s` kept its promise, or `missed` it in a gap with finetuning; others teach
        nothing.
        """
        self._life_s += LIFE_GAIN * (life_s - self._life_s)
        trust = self._trust + TRUST_STEP * (self._may_miss - missed)
        self._trust = min(MOST_TRUST, max(-MOST_TRUST, trust))

    def _remember(self, excess_s: float) -> None:
        events = self._events
        if not events or self._seen_s - events[-1][0] >= BLOCK_S:
            events.append((self._seen_s, excess_s))
        elif excess_s > events[-1][1]:
            events[-1] = events[-1][0], excess_s
        else:
            return
        self._renew_s = 0.0

    def _needed_s(self) -> float:
        ranked = sorted((excess_s for _, excess_s in self._events), reverse=True)
        if not ranked:
            return 0.0
        spared = self._spared
        whole, top = int(spared), min(TOP, len(ranked))
        ranked += [0.0] * (whole + 1)
        if whole:
            return ranked[whole] + (whole + 1 - spared) * (ranked[whole - 1] - ranked[whole])
        distance_s = (ranked[0] - ranked[top]) / top
        return ranked[0] + min(BEYOND, -math.log(max(1e-9, spared))) * distance_s

    @property
    def _start_s(self) -> float:
        """What stands for excesses that were not seen yet."""
        start_s = START_SHARE * (1 - self._seen_s / START_S) * self._tpot_s
        if self._seen_s < LOOK_S:
            return start_s
        highest_s = max((excess_s for _, excess_s in self._events), default=0.0)
        return min(start_s, max(RARE * highest_s, self._longest_pause_s))

    @property
    def _spared(self) -> float:
        """How many of the remembered excesses need not be covered."""
        seen_s = min(self._horizon_s, self._seen_s)
        return math.exp(self._trust) * self._may_miss * seen_s / max(0.1, self._life_s)

    @property
    def _horizon_s(self) -> float:
        return min(LONGEST_S, max(SHORTEST_S, self._life_s / self._may_miss))

    def _forget(self) -> None:
        events, now_s = self._events, self._seen_s
        while events and events[0][0] < now_s - self._horizon_s:
            events.popleft()
        half_s = max((excess_s for _, excess_s in events), default=0.0) / 2
        high = [at_s for at_s, excess_s in events if excess_s >= half_s]
        if len(high) < TOP:
            return
        lasted_s = max(BLOCK_S, high[-1] - high[0])
        # Were they still to come, the chance of this silence, their rate being what it was: gamma's tail.
        if (lasted_s / (lasted_s + now_s - high[-1])) ** (len(high) - 1) < SILENCE:
            self._events = deque((at_s, excess_s) for at_s, excess_s in events if excess_s < half_s)


class FixedReserve:
    """Always the same."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def observe(self, at_s: float, excess_s: float, paused_s: float = 0.0) -> None:
        """Learns nothing."""

    def judged(self, life_s: float, *, missed: bool) -> None:
        """Learns nothing."""
