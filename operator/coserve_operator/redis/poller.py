"""Redis has no watch that lasts: all endpoints are read every second, and changed ones are reconciled."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from coserve_operator.decide.job import is_final
from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.queue import KeyedQueue
from coserve_operator.redis.store import OperatorStore, StoreError
from coserve_operator.redis.stores import Stores
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
    """Compares what each tenant's Redis holds with what it held, and asks for reconciles. Tenants are polled apart: one
    whose Redis does not answer is waited for alone.
    """

    def __init__(self, cache: Cache, stores: Stores, queue: KeyedQueue[Name]) -> None:
        self._cache = cache
        self._stores = stores
        self._queue = queue
        self._seen: dict[str, tuple[Any, Any]] = {}
        self._polls: dict[str, asyncio.Task[None]] = {}
        """The last of each tenant."""
        self._troubled: dict[str, str] = {}
        """Reasons by tenant."""

    async def run(self, every_s: float, tick: Callable[[bool], None]) -> None:
        """Poll for ever; `tick` hears after each round whether every Redis could be read."""
        try:
            while True:
                self._begin()
                tick(not self._troubled)
                await asyncio.sleep(every_s)
        finally:
            for task in self._polls.values():
                task.cancel()
            await asyncio.gather(*self._polls.values(), return_exceptions=True)

    def _begin(self) -> None:
        """Begin with all tenants whose last poll is over."""
        names = {each.metadata.uid: (each.metadata.namespace, each.metadata.name) for each in self._cache.endpoints()}
        for uid in self._seen.keys() - names.keys():
            del self._seen[uid]
        tenants: dict[str, dict[str, Name]] = {}
        for uid, name in names.items():
            tenants.setdefault(self._stores.tenant(name[0]), {})[uid] = name
        for gone in [each for each, task in self._polls.items() if each not in tenants and task.done()]:
            del self._polls[gone]
            self._troubled.pop(gone, None)
        for tenant, theirs in tenants.items():
            if tenant not in self._polls or self._polls[tenant].done():
                self._polls[tenant] = asyncio.create_task(self._poll_tenant(tenant, theirs))

    async def _poll_tenant(self, tenant: str, names: dict[str, Name]) -> None:
        """Read all of one tenant once; a fault of ours is logged, and is no other tenant's."""
        store = self._stores.of(next(iter(names.values()))[0])
        whose = f"Redis of namespace {tenant}" if tenant else "Redis"
        try:
            renewed, trouble = await store.check(), None
            uids = list(names)
            for start in range(0, len(uids), BATCH):
                await self._poll(store, uids[start : start + BATCH], names)
        except StoreError as error:
            renewed, trouble = False, error
        except Exception:
            logger.exception("%s: a fault of the operator", whose)
            return
        reason, before = "" if trouble is None else trouble.reason, self._troubled.get(tenant, "")
        if trouble is None:
            self._troubled.pop(tenant, None)
        else:
            self._troubled[tenant] = reason
        if trouble is not None and reason != before:
            logger.error("%s: %s; what runs goes on, and nothing new is bound until it is back", whose, trouble)
        elif trouble is None and before:
            logger.info("%s can be read again", whose)
        if renewed or reason != before:
            for uid, name in names.items():
                self._seen.pop(uid, None)
                self._queue.add(name)

    async def _poll(self, store: OperatorStore, uids: Iterable[str], names: dict[str, Name]) -> None:
        wants = {
            uid: [job.metadata.uid for job in self._cache.group(names[uid]).jobs if not is_final(job)] for uid in uids
        }
        for uid, view in (await store.read(wants)).items():
            state, figures = (view, None) if isinstance(view, Unreadable) else (state_of(view), figures_of(view))
            before = self._seen.get(uid)
            if before is None or before[0] != state:
                self._queue.add(names[uid])
            elif before[1] != figures:
                self._queue.add(names[uid], PROGRESS_AFTER_S)
            self._seen[uid] = (state, figures)
