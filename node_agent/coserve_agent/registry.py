"""The names that clients can ask for: the base model and the published adapters, each pointing at a loaded version.

A name flips to a new version once the engine has it; the old one is unloaded after that, and requests that run on it
finish on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coserve_agent.engine_client import AdapterLoadError, EngineClient
from coserve_agent.errors import EngineGoneError
from coserve_agent.http.generate import Served
from coserve_agent.template_variables import variables_of
from coserve_api.messages import AdapterRecord
from coserve_engine.errors import CheckpointError
from coserve_engine.formats.folders import verify_folder
from coserve_engine.messages import AdapterVersion

log = logging.getLogger(__name__)

RETRY_S = 5.0
# A name must be gone this long before its version is: Redis may just have been emptied.
REMOVE_AFTER_S = 30.0


@dataclass(frozen=True)
class Loaded:
    """A version that the engine has."""

    record: AdapterRecord
    version: AdapterVersion
    served: Served


class AdapterRegistry:
    """Keeps the engine's adapters equal to the published ones. `sync` is called with what Redis says, again and
    again.
    """

    def __init__(
        self, engine: EngineClient, base: Served, artifacts: Path, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._base = base
        self._artifacts = artifacts
        self._now_s = now_s
        self._loaded: dict[str, Loaded] = {}
        self._retry_at_s: dict[str, float] = {}
        self._gone_since_s: dict[str, float] = {}

    def resolve(self, name: str) -> Served | None:
        if name == self._base.name:
            return self._base
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.served

    def listing(self) -> list[Served]:
        return [self._base, *(self._loaded[name].served for name in sorted(self._loaded))]

    def numbers(self) -> dict[str, int]:
        """name -> version number, for the heartbeat."""
        return {name: loaded.record.number for name, loaded in self._loaded.items()}

    async def sync(self, records: Mapping[str, AdapterRecord]) -> tuple[str, ...]:
        """Load what is new, drop what has gone. Returns the names whose version is not loaded."""
        for name, record in records.items():
            self._gone_since_s.pop(name, None)
            if not self._has(record) and self._retry_at_s.get(name, 0.0) <= self._now_s():
                await self._load(record)
        for name in [name for name in self._loaded if name not in records]:
            since_s = self._gone_since_s.setdefault(name, self._now_s())
            if self._now_s() - since_s >= REMOVE_AFTER_S:
                del self._gone_since_s[name]
                self._unload(self._loaded.pop(name))
        return tuple(sorted(name for name, record in records.items() if not self._has(record)))

    def _has(self, record: AdapterRecord) -> bool:
        loaded = self._loaded.get(record.name)
        return loaded is not None and loaded.record.sha256 == record.sha256 and loaded.record.number == record.number

    async def _load(self, record: AdapterRecord) -> None:
        name, folder = record.name, self._artifacts / record.path
        # The checksum is part of the identity: a number that was used twice still names two versions.
        version = AdapterVersion(f"{name}@{record.sha256[:16]}", record.number)
        if name == self._base.name:
            log.error("adapter %s: has the base model's name and cannot be served; publish it under another", name)
            self._retry_at_s[name] = self._now_s() + RETRY_S
            return
        try:
            await asyncio.to_thread(verify_folder, folder, record.sha256)
            variables = await asyncio.to_thread(variables_of, folder)
            await self._engine.load_adapter(version, str(folder))
        except (CheckpointError, AdapterLoadError, EngineGoneError) as error:
            self._retry_at_s[name] = self._now_s() + RETRY_S
            log.error("adapter %s v%d: not loaded, tried again in %g s: %s", name, record.number, RETRY_S, error)
            return
        old = self._loaded.get(name)
        served = Served(
            name, version, str(folder), int(time.time()), self._base.name, {**self._base.variables, **variables}
        )
        self._loaded[name] = Loaded(record, version, served)
        self._retry_at_s.pop(name, None)
        log.info("adapter %s v%d: loaded from %s", name, record.number, folder)
        if old is not None:
            self._unload(old)

    def _unload(self, loaded: Loaded) -> None:
        log.info("adapter %s v%d: unloaded", loaded.record.name, loaded.record.number)
        if self._engine.alive:
            self._engine.unload_adapter(loaded.version)
