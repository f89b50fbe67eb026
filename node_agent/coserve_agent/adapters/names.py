"""All names that clients can ask for: the base model, adapters, and those that a job here trains just now."""

from __future__ import annotations

from coserve_agent.adapters.live import SUFFIX, LiveAdapters
from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.adapters.served import Served, Unloaded


class Names:
    """The `Models` of an agent."""

    def __init__(self, registry: AdapterRegistry, live: LiveAdapters) -> None:
        self._registry = registry
        self._live = live

    def resolve(self, name: str) -> Served | None:
        return self._live.resolve(name) if name.endswith(SUFFIX) else self._registry.resolve(name)

    async def bring(self, name: str, within_s: float) -> Served | None:
        return self._live.take(name) if name.endswith(SUFFIX) else await self._registry.bring(name, within_s)

    def let_go(self, served: Served) -> None:
        if served.version is not None:
            (self._live if served.name.endswith(SUFFIX) else self._registry.shelf).let_go(served.version)

    def unloaded(self, name: str) -> Unloaded | None:
        return self._registry.unloaded(name)

    def listing(self) -> list[Served]:
        return [*self._registry.listing(), *self._live.listing()]
