"""Redis has no watch that lasts: what says that it has changed is read each second, and everything now and then.

Agents and feeders mark an endpoint whose state they change; one of the version before does not, and figures are no
change. A lost agent marks nothing: its last heartbeat is old.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.queue import KeyedQueue
from coserve_operator.redis.store import OperatorStore, StoreError
from coserve_operator.watch.cache import Cache, Name

logger = logging.getLogger(__name__)

BATCH = 100
"""Endpoints read at once."""
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

    Every `every_s` it reads what was marked, what we have written to, and endpoints that lost an agent; every endpoint
    at the latest after `full_s`, and after `pace.progress_s()` one with a job that runs.
    """

    def __init__(
        self, cache: Cache, store: OperatorStore, queue: KeyedQueue[Name], every_s: float, full_s: float, pace: Pace
    ) -> None:
        self._cache, self._store, self._queue, self._pace = cache, store, queue, pace
        self._every_s, self._full_s = every_s, full_s
        self._marks: dict[str, Any] = {}
        self._due: dict[str, float] = {}
        """When an endpoint is read whatever its mark says, by the store's clock."""
        self._seen: dict[str, tuple[Any, Any, Any]] = {}

    async def run(self, tick: Callable[[bool], None]) -> None:
        """Poll for ever; `tick` hears after each round whether Redis could be read."""
        readable = True
        while True:
            try:
                await self.poll()
                if not readable:
                    logger.info("Redis can be read again")
                readable = True
            except StoreError as error:
                if readable:
                    logger.error("%s; what runs goes on, and nothing new is bound until it is back", error)
                readable = False
            tick(readable)
            await asyncio.sleep(self._every_s)

    async def poll(self) -> None:
        """Read what has changed, and what has not been read for long."""
        if await self._store.check():
            for known in (self._marks, self._due, self._seen):
                known.clear()
            for group in self._cache.groups():
                self._queue.add(group)
        names = {each.metadata.uid: (each.metadata.namespace, each.metadata.name) for each in self._cache.endpoints()}
        for uid in self._seen.keys() - names.keys():
            for known in (self._marks, self._due, self._seen):
                known.pop(uid, None)
        uids = list(names)
        for start in range(0, len(uids), ASKED):
            some = uids[start : start + ASKED]
            found = await self._store.changes(some)
            changed = [uid for uid in some if self._is_due(uid, *found[uid])]
            for first in range(0, len(changed), BATCH):
                await self._read(changed[first : first + BATCH], names)
            self._marks |= {uid: found[uid][0] for uid in changed}
        self._store.written.intersection_update(names)

    def _is_due(self, uid: str, mark: Any, lost: bool) -> bool:
        if lost or uid not in self._marks or self._marks[uid] != mark or uid in self._store.written:
            return True
        return self._store.clock() >= self._due.get(uid, 0.0)

    async def _read(self, uids: Sequence[str], names: dict[str, Name]) -> None:
        self._store.written.difference_update(uids)
        wants = {uid: self._cache.living(names[uid]) for uid in uids}
        for uid, view in (await self._store.read(wants)).items():
            self._due[uid] = self._store.clock() + self._wait_s(view)
            before = self._seen.get(uid)
            seen = (view, None, None)
            if not isinstance(view, Unreadable):
                seen = (state_of(view), load_of(view), progress_of(view))
            self._seen[uid] = seen
            if before is None or before[0] != seen[0]:
                self._queue.add(names[uid])
            elif before[2] != seen[2]:
                self._queue.add(names[uid], self._pace.progress_s())
            elif before[1] != seen[1]:
                self._queue.add(names[uid], self._pace.load_s())

    def _wait_s(self, view: RedisView | Unreadable) -> float:
        """Return when to read again, if nothing says that it has changed."""
        if isinstance(view, Unreadable):
            return self._full_s
        if not view.settled or view.incarnation is None:
            return 0.0
        runs = any(beat.jobs for beat in view.agents.values())
        return min(self._full_s, self._pace.progress_s()) if runs else self._full_s
