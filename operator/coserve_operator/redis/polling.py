"""All tenants are polled at once and apart: one whose Redis does not answer is waited for alone."""

import asyncio
import logging
from collections.abc import Callable

from coserve_operator.queue import KeyedQueue
from coserve_operator.redis.poller import Pace, Poller
from coserve_operator.redis.store import StoreError
from coserve_operator.redis.stores import Stores
from coserve_operator.watch.cache import Cache, Name

logger = logging.getLogger(__name__)


class Polling:
    """Has a poller for each tenant. `full_s` and `pace` are as for `Poller`."""

    def __init__(self, cache: Cache, stores: Stores, queue: KeyedQueue[Name], full_s: float, pace: Pace) -> None:
        self._cache, self._stores, self._queue, self._full_s, self._pace = cache, stores, queue, full_s, pace
        self._pollers: dict[str, Poller] = {}
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
        tenants: dict[str, dict[str, Name]] = {}
        for each in self._cache.endpoints():
            namespace = each.metadata.namespace
            theirs = tenants.setdefault(self._stores.tenant(namespace), {})
            theirs[each.metadata.uid] = (namespace, each.metadata.name)
        for gone in [each for each, task in self._polls.items() if each not in tenants and task.done()]:
            del self._polls[gone]
            self._pollers.pop(gone, None)
            self._troubled.pop(gone, None)
        for tenant, theirs in tenants.items():
            if tenant not in self._polls or self._polls[tenant].done():
                self._polls[tenant] = asyncio.create_task(self._poll(tenant, theirs))

    async def _poll(self, tenant: str, names: dict[str, Name]) -> None:
        """Poll one tenant once; a fault of ours is logged, and is no other tenant's."""
        poller = self._poller(tenant, names)
        whose = f"Redis of namespace {tenant}" if tenant else "Redis"
        before, reason = self._troubled.get(tenant, ""), ""
        try:
            await poller.poll(names)
        except StoreError as error:
            reason = error.reason
            if reason != before:
                logger.error("%s: %s; what runs goes on, and nothing new is bound until it is back", whose, error)
        except Exception:
            logger.exception("%s: a fault of the operator", whose)
            return
        if reason == before:
            return
        if reason:
            self._troubled[tenant] = reason
        else:
            del self._troubled[tenant]
            logger.info("%s can be read again", whose)
        poller.begin_anew(names)

    def _poller(self, tenant: str, names: dict[str, Name]) -> Poller:
        store = self._stores.of(next(iter(names.values()))[0])
        known = self._pollers.get(tenant)
        if known is None or known.store is not store:
            known = self._pollers[tenant] = Poller(self._cache, store, self._queue, self._full_s, self._pace)
        return known
