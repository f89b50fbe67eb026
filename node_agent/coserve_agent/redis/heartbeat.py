"""The agent's sign of life, every second. It waits for nothing but Redis, and for that not long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.exceptions import AuthenticationError, NoPermissionError

from coserve_contract.away import STORE_AWAY
from coserve_contract.messages import Heartbeat
from coserve_contract.scripts import Fencing

log = logging.getLogger(__name__)

PERIOD_S = 1.0
COMPLAIN_EVERY_S = 30.0


class HeartbeatLoop:
    """Sends what `beat` returns, and registers again whenever Redis has a new incarnation."""

    def __init__(
        self,
        fencing: Fencing,
        beat: Callable[[], Heartbeat],
        *,
        now_s: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._fencing = fencing
        self._beat = beat
        self._now_s = now_s
        self._sleep = sleep
        self._complained_s = float("-inf")
        self.connected = False

    async def run(self) -> None:
        while True:
            begun_s = self._now_s()
            await self.once()
            await self._sleep(max(0.0, PERIOD_S - (self._now_s() - begun_s)))

    async def once(self) -> None:
        try:
            incarnation = await self._fencing.heartbeat(self._beat())
        except STORE_AWAY as error:
            self._lost(error)
            return
        if not self.connected:
            log.info("redis: connected")
        self.connected = True
        self._complained_s = float("-inf")
        if incarnation != self._fencing.incarnation:
            log.info("redis: incarnation is %s, was %s", incarnation or "missing", self._fencing.incarnation or "none")
            self._fencing.register(incarnation)

    def _lost(self, error: Exception) -> None:
        self.connected = False
        if self._now_s() - self._complained_s < COMPLAIN_EVERY_S:
            return
        self._complained_s = self._now_s()
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            remedy = "check COSERVE_REDIS_USERNAME and COSERVE_REDIS_PASSWORD against the endpoint's Secret"
            log.error("redis: refuses this agent (%s); %s. Serving goes on, finetuning waits", error, remedy)
        else:
            log.warning("redis: cannot be reached (%s). Serving goes on, finetuning accepts nothing meanwhile", error)
