"""Where the agent stands between start and end; readiness, admission and heartbeats all ask here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

ADAPTERS_S = 60.0
"""How long an agent that has its model waits for published versions that are neither loaded nor given up."""


class Lifecycle:
    """Model loading, then adapters loading, then ready; draining from SIGTERM on.

    `adapters_known`: the list of published adapters was read. `pending_adapters`: those of it that are neither loaded
    nor given up. Once there was none, or ADAPTERS_S passed, a version that is published later does not take readiness
    away while it loads.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.model_loaded = False
        self.adapters_known = False
        self.pending_adapters: tuple[str, ...] = ()
        self.serves_without_redis = False
        self.slow: str | None = None
        """Why it computes slower than it could, though it is ready."""
        self._now_s = now_s
        self._waits_since_s: float | None = None
        self._done_waiting = False
        self._drain = asyncio.Event()

    def set_adapters(self, pending: tuple[str, ...]) -> None:
        self.adapters_known = True
        self.pending_adapters = pending
        self._done_waiting = self._done_waiting or not pending

    def not_ready(self) -> str | None:
        """Why the agent should get no traffic, or None."""
        if self._drain.is_set():
            return "draining: the agent is shutting down"
        if not self.model_loaded:
            return "the model is being loaded"
        if self._done_waiting or self.serves_without_redis:
            return None
        if not self.adapters_known:
            return "the list of published adapters has not been read yet"
        if self._waits_since_s is None:
            self._waits_since_s = self._now_s()
        if self._now_s() - self._waits_since_s >= ADAPTERS_S:
            log.warning("adapters: served without %s, which are still being loaded", ", ".join(self.pending_adapters))
            self._done_waiting = True
            return None
        return f"adapters are being loaded: {', '.join(self.pending_adapters)}"

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

    def start_draining(self) -> None:
        self._drain.set()

    async def until_draining(self) -> None:
        """Wait for start_draining()."""
        await self._drain.wait()
