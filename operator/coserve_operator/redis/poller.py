"""Redis has no watch that lasts: all endpoints are read every second, and changed ones are reconciled."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from coserve_operator.decide.job import is_final
from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.queue import KeyedQueue
from coserve_operator.redis.store import OperatorStore, StoreError
from coserve_operator.watch.cache import Cache, Name

logger = logging.getLogger(__name__)

BATCH = 100
"""Endpoints read at once."""
PROGRESS_AFTER_S = 1.0
"""A change of mere figures is looked at this much later, so that several become one reconcile."""


def state_of(view: RedisView) -> Any:
    """Return what of a view is a reason to reconcile at once."""
    agents = {
        agent: (
            beat.ready,
            beat.draining,
            beat.model_loaded,
            beat.error,
            tuple(sorted(beat.adapters.items())),
            tuple(sorted((job, run.epoch) for job, run in beat.jobs.items())),
        )
        for agent, beat in view.agents.items()
    }
    jobs = {uid: (record.fence, record.result, record.feed) for uid, record in view.jobs.items()}
    return view.incarnation, agents, jobs, view.known_jobs, view.settled


def figures_of(view: RedisView) -> Any:
    """Return what of a view only changes figures in a status."""
    agents = {agent: (round(beat.load.saturation_percent), beat.slo) for agent, beat in view.agents.items()}
    jobs = {uid: (record.progress, record.checkpoint) for uid, record in view.jobs.items()}
    return agents, jobs


class Poller:
    """Compares what Redis holds with what it held, and asks for reconciles."""

    def __init__(self, cache: Cache, store: OperatorStore, queue: KeyedQueue[Name]) -> None:
        self._cache = cache
        self._store = store
        self._queue = queue
        self._seen: dict[str, tuple[Any, Any]] = {}

    async def run(self, every_s: float, tick: Callable[[bool], None]) -> None:
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
            await asyncio.sleep(every_s)

    async def poll(self) -> None:
        """Read everything once."""
        if await self._store.check():
            self._seen.clear()
            for group in self._cache.groups():
                self._queue.add(group)
        names = {each.metadata.uid: (each.metadata.namespace, each.metadata.name) for each in self._cache.endpoints()}
        for uid in self._seen.keys() - names.keys():
            del self._seen[uid]
        uids = list(names)
        for start in range(0, len(uids), BATCH):
            await self._poll(uids[start : start + BATCH], names)

    async def _poll(self, uids: Iterable[str], names: dict[str, Name]) -> None:
        wants = {
            uid: [job.metadata.uid for job in self._cache.group(names[uid]).jobs if not is_final(job)] for uid in uids
        }
        for uid, view in (await self._store.read(wants)).items():
            state, figures = (view, None) if isinstance(view, Unreadable) else (state_of(view), figures_of(view))
            before = self._seen.get(uid)
            if before is None or before[0] != state:
                self._queue.add(names[uid])
            elif before[1] != figures:
                self._queue.add(names[uid], PROGRESS_AFTER_S)
            self._seen[uid] = (state, figures)
