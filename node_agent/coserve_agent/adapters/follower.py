"""Keeps the adapters that this agent serves equal to the published ones in Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.lifecycle import Lifecycle
from coserve_contract.away import STORE_AWAY
from coserve_contract.protocols import JobStore

log = logging.getLogger(__name__)

POLL_S = 0.5
# An agent that starts while Redis is down serves the base model after this long, rather than nothing.
GRACE_S = 15.0


class AdapterFollower:
    """Looks at the adapters hash twice a second."""

    def __init__(
        self,
        store: JobStore,
        registry: AdapterRegistry,
        lifecycle: Lifecycle,
        *,
        now_s: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._registry = registry
        self._lifecycle = lifecycle
        self._now_s = now_s
        self._sleep = sleep
        self._complaint = ""

    async def run(self) -> None:
        begun_s = self._now_s()
        while True:
            await self.once()
            waiting = not self._lifecycle.adapters_known and not self._lifecycle.serves_without_redis
            if waiting and self._now_s() - begun_s > GRACE_S:
                log.warning("redis: published adapters are unknown; the base model is served without them")
                self._lifecycle.serves_without_redis = True
            await self._sleep(POLL_S)

    async def once(self) -> None:
        try:
            records, broken = await self._store.published()
            # Read after the adapters: an emptied Redis has no incarnation, and then an empty hash means nothing.
            if not await self._store.incarnation():
                return
        except STORE_AWAY:
            return  # the heartbeat says so in the log
        complaint = "; ".join(map(str, broken))
        if complaint and complaint != self._complaint:
            log.error("adapters: %s", complaint)
        self._complaint = complaint
        self._registry.expect(records)
        self._lifecycle.set_adapters(self._registry.pending())  # a folder may take its time
        await self._registry.sync(records)
        self._lifecycle.set_adapters(self._registry.pending())
