"""The queue of reconciles: no key is worked on twice at once, a key that fails waits longer each time, and what has
just been changed does not stand behind thousands that are looked at anyway, as in controller-runtime.

`Schedule` decides and knows no clock; `KeyedQueue` is the asyncio shell around it.
"""

import asyncio
import heapq
import math
import random
from collections.abc import Callable, Hashable
from enum import IntEnum
from itertools import chain
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
IN_A_ROW = 3
"""So many urgent keys are handed out before one that is due is: these must not starve."""


class Lane(IntEnum):
    """What is urgent, the first first."""

    ASKED = 0
    """Somebody has changed an object, and waits for what comes of it."""
    HAPPENED = 1
    """Something has changed by itself."""


class Schedule(Generic[K]):
    """Which key is due when. Times are seconds of any monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._urgent: dict[Lane, dict[K, None]] = {lane: {} for lane in Lane}
        """In the order in which they came."""
        self._in_a_row = 0
        self._in_work: set[K] = set()
        self._sequence = 0

    def __len__(self) -> int:
        return len(set(self._due).union(*self._urgent.values()))

    def add(self, key: K, due: float) -> None:
        """Ask for a reconcile at `due`; an earlier request for the same key stands."""
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        if key not in self._in_work:
            self._push(key, due)

    def hurry(self, key: K, lane: Lane) -> None:
        """Ask for a reconcile now, before keys that are due."""
        self._urgent[lane].setdefault(key)

    def pop(self, now: float) -> K | None:
        """Return a key that is due and not in work, and take it into work: it stands for all requests so far."""
        urgent, due = self._first_urgent(), self._first_due()
        if due is not None and due[0] > now:
            due = None
        if urgent is not None and (due is None or self._in_a_row < IN_A_ROW):
            key = urgent
            self._in_a_row += 1
        elif due is not None:
            key = due[1]
            self._in_a_row = 0
        else:
            return None
        for lane in self._urgent.values():
            lane.pop(key, None)
        self._due.pop(key, None)
        self._in_work.add(key)
        return key

    def next_due(self) -> float | None:
        """Return when `pop` may have something, or None when only new requests can change that."""
        if self._first_urgent() is not None:
            return -math.inf
        due = self._first_due()
        return None if due is None else due[0]

    def done(self, key: K) -> None:
        """End the work on `key`; requests that came meanwhile count from now on."""
        self._in_work.remove(key)
        if key in self._due:
            self._push(key, self._due[key])

    def _first_urgent(self) -> K | None:
        lanes = chain(*self._urgent.values())
        return next((key for key in lanes if key not in self._in_work), None)

    def _first_due(self) -> tuple[float, K] | None:
        """Return the first of the heap that still counts: a key may be in work, or was asked for earlier since."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) == due and key not in self._in_work:
                return due, key
            heapq.heappop(self._heap)
        return None

    def _push(self, key: K, due: float) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (due, self._sequence, key))


class BackOff(Generic[K]):
    """Delays after failures: doubling from `first_s` to `most_s`, each spread over +-50 % so that retries part."""

    def __init__(self, rng: random.Random, first_s: float = 0.5, most_s: float = 60.0) -> None:
        self._rng = rng
        self._first_s = first_s
        self._most_s = most_s
        self._failures: dict[K, int] = {}

    def failed(self, key: K) -> float:
        """Count a failure of `key` and return the seconds to wait."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        return float(min(self._most_s, self._first_s * 2 ** min(count, 30)) * self._rng.uniform(0.5, 1.5))

    def succeeded(self, key: K) -> None:
        """Forget the failures of `key`."""
        self._failures.pop(key, None)


class KeyedQueue(Generic[K]):
    """`add` from anywhere in the loop, `get` and `done` in workers."""

    def __init__(self, clock: Callable[[], float], backoff: BackOff[K]) -> None:
        self._clock = clock
        self._backoff = backoff
        self._schedule: Schedule[K] = Schedule()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._schedule)

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Ask for a reconcile of `key` in `delay_s` seconds at the latest."""
        self._schedule.add(key, self._clock() + delay_s)
        self._wake.set()

    def hurry(self, key: K, lane: Lane) -> None:
        """Ask for a reconcile of `key` now: something has changed."""
        self._schedule.hurry(key, lane)
        self._wake.set()

    async def get(self) -> K:
        """Wait for a key that is due."""
        while (key := self._schedule.pop(self._clock())) is None:
            self._wake.clear()
            due = self._schedule.next_due()
            try:
                await asyncio.wait_for(self._wake.wait(), None if due is None else max(0.0, due - self._clock()))
            except TimeoutError:
                continue
        return key

    def done(self, key: K, requeue_after_s: float | None = None) -> None:
        """End the work on `key` successfully, and ask for the next look at it."""
        self._backoff.succeeded(key)
        if requeue_after_s is not None:
            self._schedule.add(key, self._clock() + requeue_after_s)
        self._schedule.done(key)
        self._wake.set()

    def failed(self, key: K) -> float:
        """End the work on `key` after an error; return the seconds until it is tried again."""
        delay_s = self._backoff.failed(key)
        self._schedule.add(key, self._clock() + delay_s)
        self._schedule.done(key)
        self._wake.set()
        return delay_s
