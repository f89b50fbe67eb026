"""Where the agent stands between start and end; readiness, admission and heartbeats all ask here."""

from __future__ import annotations

import asyncio


class Lifecycle:
    """Model loading, then adapters loading, then ready; draining from SIGTERM on.

    `adapters_known`: the list of published adapters was read. `missing_adapters`: those of it that are not loaded
    (yet). Once all were loaded, a version that is published later does not take readiness away while it loads.
    """

    def __init__(self) -> None:
        self.model_loaded = False
        self.adapters_known = False
        self.missing_adapters: tuple[str, ...] = ()
        self.serves_without_redis = False
        self._had_all_adapters = False
        self._drain = asyncio.Event()

    def set_adapters(self, missing: tuple[str, ...]) -> None:
        self.adapters_known = True
        self.missing_adapters = missing
        self._had_all_adapters = self._had_all_adapters or not missing

    def not_ready(self) -> str | None:
        """Why the agent should get no traffic, or None."""
        if self._drain.is_set():
            return "draining: the agent is shutting down"
        if not self.model_loaded:
            return "the model is being loaded"
        if self._had_all_adapters or self.serves_without_redis:
            return None
        if not self.adapters_known:
            return "the list of published adapters has not been read yet"
        return f"adapters are being loaded: {', '.join(self.missing_adapters)}"

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

    def start_draining(self) -> None:
        self._drain.set()

    async def until_draining(self) -> None:
        """Wait for start_draining()."""
        await self._drain.wait()
