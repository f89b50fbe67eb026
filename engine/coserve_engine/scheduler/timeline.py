"""What a device that computes behind the host has been given, and when it will be through: so that it never waits for
the next plan, and a request that comes never waits long for what was enqueued before it.

The host enqueues forwards and backward units; the device takes them one after another. What each will take is
predicted, and marks (the device's own timestamps) correct it. All times are seconds of one clock, which is passed in:
an engine maps its device's events to it. Three rules follow:

- A unit is enqueued when what is queued has shrunk to a lead, never earlier.
- An iteration is planned and enqueued a lead before the device is through with the one before. By then the units of
  that have let the host see what its forward gave; where it has none, its rows are planned without (one runs ahead): a
  row that turns out to have ended is computed and thrown away.
- What needs the host between two tokens is planned when nothing is unseen.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from coserve_engine.latency.errorbound import Highest

LEAD_S = 2e-3
"""Work that the device still has when the next is enqueued: more than a host's hiccup and the error of predictions."""
MOST_UNSEEN = 1
"""Forwards whose outcome is unknown when another is planned."""


class Span(NamedTuple):
    """When the device computed something, by its own clock; `idle_s`: how long it had nothing to do before."""

    start_s: float
    end_s: float
    idle_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class _Enqueued:
    id: int
    forward: bool
    predicted_s: float
    at_s: float
    """When it was enqueued: it starts no earlier."""
    start_s: float | None = None


class Timeline:
    """The work of one device, in the order in which it was enqueued. Ids count up from 0."""

    def __init__(self, lead_s: float = LEAD_S) -> None:
        self._lead_s = lead_s
        self._queue: deque[_Enqueued] = deque()
        self._unseen = 0
        """Forwards in the queue."""
        self._next_id = 0
        self._ended_s = -math.inf
        """End of the last that was reported."""
        self._planning = Highest()

    def enqueue(self, predicted_s: float, now: float, *, forward: bool = False) -> int:
        """A forward, or a unit, that is expected to take `predicted_s`, was handed over now. Returns its id."""
        self._queue.append(_Enqueued(self._next_id, forward, predicted_s, now))
        self._unseen += forward
        self._next_id += 1
        return self._next_id - 1

    def started(self, id: int, at_s: float) -> None:
        """The device began with it."""
        self._drop_until(id)
        self._queue[0].start_s = at_s

    def ended(self, id: int, at_s: float) -> Span:
        """The device is through with it, and so with all before it. Without a mark of its start this was when it was
        enqueued, or at the end of what lay before it.
        """
        self._drop_until(id)
        done = self._queue.popleft()
        self._unseen -= done.forward
        start_s = max(done.at_s, self._ended_s) if done.start_s is None else done.start_s
        idle_s = max(0.0, start_s - self._ended_s) if self._ended_s > -math.inf else 0.0
        self._ended_s = at_s
        return Span(start_s, at_s, idle_s)

    def shortened(self, id: int, predicted_s: float) -> None:
        """It takes so long in all, since the rest of it was dropped."""
        for enqueued in self._queue:
            if enqueued.id == id:
                enqueued.predicted_s = predicted_s

    def _drop_until(self, id: int) -> None:
        if not any(enqueued.id == id for enqueued in self._queue):
            raise ValueError(f"{id} is not in the queue")
        while self._queue[0].id != id:
            self._unseen -= self._queue.popleft().forward

    # ---- what follows ----

    def end_of(self, id: int, now: float) -> float:
        """When the device will be through with what is in the queue under `id`."""
        at_s = self._ended_s
        for enqueued in self._queue:
            start_s = max(at_s, enqueued.at_s) if enqueued.start_s is None else enqueued.start_s
            at_s = max(now, start_s + enqueued.predicted_s)  # had it ended by now, a mark would say so
            if enqueued.id == id:
                return at_s
        raise ValueError(f"{id} is not in the queue")

    def free_at(self, now: float) -> float:
        """When the device will be through with everything; now, where it has nothing."""
        return self.end_of(self._queue[-1].id, now) if self._queue else now

    def queued_s(self, now: float) -> float:
        """Seconds of work that the device has."""
        return self.free_at(now) - now

    @property
    def unseen(self) -> int:
        """Forwards of which no end was reported: at what depth the next is planned."""
        return self._unseen

    @property
    def planning_s(self) -> float:
        """What the host nearly always needs from the begin of a plan until its forward is enqueued."""
        return self._planning.seconds

    def planned(self, seconds: float) -> None:
        """Planning took so long."""
        self._planning.update(seconds)

    def begins_at(self, now: float) -> float:
        """When the device will begin with what is planned from now on."""
        return max(self.free_at(now), now + self.planning_s)

    def unit_at(self, now: float, unit_s: float) -> float:
        """When a unit of so many seconds is to be enqueued (now or earlier: at once): a lead before the device is
        through, or as long before as a plan takes, since a request that comes waits for its plan in any case.
        """
        return self.free_at(now) - max(min(self._lead_s, unit_s), self.planning_s)

    def plan_at(self, now: float, *, needs_host: bool = False) -> float:
        """When the next iteration is to be planned (now or earlier: at once); infinite where a forward has to end
        before, all of them where a sequence `needs_host`.
        """
        if self._unseen > (0 if needs_host else MOST_UNSEEN):
            return math.inf
        return self.free_at(now) - self._lead_s - self.planning_s
