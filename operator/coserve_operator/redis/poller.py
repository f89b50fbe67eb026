"""Redis has no watch that lasts: what says that it has changed is read twice a second, and everything now and then.

Agents and feeders mark an endpoint whose state they change; one of the version before does not, and figures are no
change. A lost agent marks nothing: its last heartbeat is old.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.queue import KeyedQueue, Lane
from coserve_operator.redis.store import OperatorStore
from coserve_operator.watch.cache import Cache, Name

BATCH = 100
"""Endpoints read at once."""
SOON_S, SOON_PER_S = 1.0, 200
"""After this time an endpoint is read again that is not yet as it is to be; of many, so many a second: after a start it
is a pass that they wait for, and reading them again and again would take its time.
"""
ASKED = 500
"""Endpoints whose marks are asked for at once."""


class Pace(Protocol):
    """How often figures are written, and so looked at."""

    def progress_s(self) -> float:
        """Return how often those of a job are."""
        ...

    def load_s(self) -> float:
        """Return how often those of an endpoint are."""
        ...


def state_of(view: RedisView) -> Any:
    """Return what of a view is a reason to reconcile at once."""
    agents = {agent: beat.state for agent, beat in view.agents.items()}
    jobs = {uid: (record.fence, record.result, record.feed) for uid, record in view.jobs.items()}
    return view.incarnation, agents, jobs, view.known_jobs, view.settled


def load_of(view: RedisView) -> Any:
    """Return the figures of agents."""
    return {agent: (round(beat.load.saturation_percent), beat.slo) for agent, beat in view.agents.items()}


def progress_of(view: RedisView) -> Any:
    """Return the figures of jobs."""
    return {uid: (record.progress, record.checkpoint) for uid, record in view.jobs.items()}


class Poller:
    """Compares what a Redis holds with what it held, and asks for reconciles.

    Each poll reads what was marked, what we have written to, and endpoints that lost an agent; every endpoint at the
    latest after `full_s`, and after `pace.progress_s()` one with a job that runs. One that does not read waits for
    `full_s` whatever it marks: reading rubbish takes the others' time.
    """

    def __init__(self, cache: Cache, store: OperatorStore, queue: KeyedQueue[Name], full_s: float, pace: Pace) -> None:
        self._cache, self.store, self._queue, self._full_s, self._pace = cache, store, queue, full_s, pace
        self._marks: dict[str, Any] = {}
        self._due: dict[str, float] = {}
        """When an endpoint is read whatever its mark says, by the store's clock."""
        self._seen: dict[str, tuple[Any, Any, Any]] = {}

    async def poll(self, names: dict[str, Name]) -> None:
        """Read of these endpoints, by uid, what has changed, and what has not been read for long.

        StoreError: Redis does not answer, or is in trouble.
        """
        if await self.store.check():
            self.begin_anew(names)
        for uid in self._seen.keys() - names.keys():
            for known in (self._marks, self._due, self._seen):
                known.pop(uid, None)
        uids = list(names)
        for start in range(0, len(uids), ASKED):
            some = uids[start : start + ASKED]
            found = await self.store.changes(some)
            changed = [uid for uid in some if self._is_due(uid, *found[uid])]
            for first in range(0, len(changed), BATCH):
                await self._read(changed[first : first + BATCH], names)
            self._marks |= {uid: found[uid][0] for uid in changed}
        self.store.written.intersection_update(names)

    def begin_anew(self, names: dict[str, Name]) -> None:
        """Forget what was read, and have these endpoints looked at."""
        for known in (self._marks, self._due, self._seen):
            known.clear()
        for name in names.values():
            self._queue.add(name)

    def _is_due(self, uid: str, mark: Any, lost: bool) -> bool:
        if self.store.clock() >= self._due.get(uid, 0.0):
            return True
        if isinstance(self._seen[uid][0], Unreadable):
            return False
        return lost or uid not in self._marks or self._marks[uid] != mark or uid in self.store.written

    async def _read(self, uids: Sequence[str], names: dict[str, Name]) -> None:
        self.store.written.difference_update(uids)
        wants = {uid: self._cache.living(names[uid]) for uid in uids}
        for uid, view in (await self.store.read(wants)).items():
            self._due[uid] = self.store.clock() + self._wait_s(view, max(SOON_S, len(names) / SOON_PER_S))
            before = self._seen.get(uid)
            seen = (view, None, None)
            if not isinstance(view, Unreadable):
                seen = (state_of(view), load_of(view), progress_of(view))
            self._seen[uid] = seen
            if before is None:
                self._queue.add(names[uid])
            elif before[0] != seen[0]:
                self._queue.hurry(names[uid], Lane.HAPPENED)
            elif before[2] != seen[2]:
                self._queue.add(names[uid], self._pace.progress_s())
            elif before[1] != seen[1]:
                self._queue.add(names[uid], self._pace.load_s())

    def _wait_s(self, view: RedisView | Unreadable, soon_s: float) -> float:
        """Return when to read again, if nothing says that it has changed."""
        if isinstance(view, Unreadable):
            return self._full_s
        if not view.settled or view.incarnation is None:
            return min(self._full_s, soon_s)
        runs = any(beat.jobs for beat in view.agents.values())
        return min(self._full_s, self._pace.progress_s()) if runs else self._full_s
