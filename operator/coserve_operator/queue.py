"""The queue of reconciles: no key is worked on twice at once, and a key that fails waits longer each time.

`Schedule` decides and knows no clock; `KeyedQueue` is the asyncio shell around it.
"""

import asyncio
import heapq
import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Schedule(Generic[K]):
    """Which key is due when. Times are seconds of any monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._in_work: set[K] = set()
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: K, due: float) -> None:
        """Ask for a reconcile at `due`; an earlier request for the same key stands."""
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        if key not in self._in_work:
            self._push(key, due)

    def pop(self, now: float) -> K | None:
        """Return a key that is due and not in work, and take it into work."""
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) != due or key in self._in_work:
                continue  # an earlier request overtook this entry
            del self._due[key]
            self._in_work.add(key)
            return key
        return None

    def next_due(self) -> float | None:
        """Return when `pop` may have something, or None when only new requests can change that."""
        while self._heap and (self._due.get(self._heap[0][2]) != self._heap[0][0] or self._heap[0][2] in self._in_work):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def done(self, key: K) -> None:
        """End the work on `key`; requests that came meanwhile count from now on."""
        self._in_work.remove(key)
        if key in self._due:
            self._push(key, self._due[key])

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
