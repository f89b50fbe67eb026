"""The names that clients can ask for: the base model and the published adapters, each pointing at a loaded version.

A name flips to a new version once the engine has it; the old one is unloaded after that, and requests that run on it
finish on it. A version that does not load keeps no other from being served: it is given up, and tried again later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coserve_agent.adapters.served import Served, Unloaded
from coserve_agent.adapters.shelf import Shelf
from coserve_agent.chat.variables import variables_of
from coserve_agent.engine.client import AdapterLoadError
from coserve_agent.errors import EngineGoneError
from coserve_contract.messages import MOST_FAILURES, MOST_REASON, AdapterFailure, AdapterRecord
from coserve_engine.errors import CheckpointError
from coserve_engine.formats.folders import verify_folder
from coserve_engine.messages import AdapterVersion

log = logging.getLogger(__name__)

RETRY_S, LONGEST_RETRY_S = 5.0, 300.0
"""Until a version that did not load is tried again: so long after the first time, and twice as long after each other.
"""
# A name must be gone this long before its version is: Redis may just have been emptied.
REMOVE_AFTER_S = 30.0


@dataclass(frozen=True)
class Loaded:
    """A version that the engine has, or had before it made room for others."""

    record: AdapterRecord
    version: AdapterVersion
    served: Served


@dataclass(frozen=True)
class Failed:
    """A version that did not load, after `tries` tries."""

    record: AdapterRecord
    tries: int
    reason: str
    retry_at_s: float


class AdapterRegistry:
    """Keeps the engine's adapters equal to the published ones. `sync` is called with what Redis says, again and
    again.
    """

    def __init__(
        self, shelf: Shelf, base: Served, artifacts: Path, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.shelf = shelf
        self._base = base
        self._artifacts = artifacts
        self._now_s = now_s
        self._wanted: Mapping[str, AdapterRecord] = {}
        self._loaded: dict[str, Loaded] = {}
        self._failed: dict[str, Failed] = {}
        self._gone_since_s: dict[str, float] = {}
        self._own: dict[str, AdapterRecord] = {}
        """What is served though nobody published it."""

    def resolve(self, name: str) -> Served | None:
        if name == self._base.name:
            return self._base
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.served

    async def bring(self, name: str, within_s: float) -> Served | None:
        """As `Models.bring`."""
        while (served := self.resolve(name)) is not None and served.version is not None:
            try:
                async with asyncio.timeout(within_s):
                    await self.shelf.take(served.version, served.root)
                break
            except (AdapterLoadError, EngineGoneError) as error:
                loaded = self._loaded.get(name)
                if loaded is not None and loaded.served is served:  # else another version is served by now
                    del self._loaded[name]
                    self._give_up(loaded.record, str(error))
        return served

    def unloaded(self, name: str) -> Unloaded | None:
        if name not in self._wanted:
            return None
        failed = self._failed.get(name)
        wait_s = 0.0 if failed is None else failed.retry_at_s - self._now_s()
        return Unloaded(failed=failed is not None, retry_after_s=max(1, math.ceil(wait_s)))

    def listing(self) -> list[Served]:
        return [self._base, *(self._loaded[name].served for name in sorted(self._loaded))]

    def numbers(self) -> dict[str, int]:
        """name -> version number, for the heartbeat."""
        return {name: loaded.record.number for name, loaded in self._loaded.items()}

    def failures(self) -> tuple[AdapterFailure, ...]:
        """What did not load, for the heartbeat."""
        first = sorted(self._failed)[:MOST_FAILURES]
        return tuple(
            AdapterFailure(name=name, number=one.record.number, tries=one.tries, reason=one.reason)
            for name, one in ((name, self._failed[name]) for name in first)
        )

    def pending(self) -> tuple[str, ...]:
        """The names whose version is neither loaded nor given up."""
        return tuple(sorted(name for name in self._missing() if name not in self._failed))

    def expect(self, records: Mapping[str, AdapterRecord]) -> None:
        """Note what is published; `sync` loads it."""
        self._wanted = {**records, **self._own}
        self._failed = {name: one for name, one in self._failed.items() if self._wanted.get(name) == one.record}

    async def add(self, record: AdapterRecord) -> None:
        """Serve a version that nobody published, in the place of what had its name.

        Raises:
            CheckpointError, AdapterLoadError, EngineGoneError, OSError: it cannot be loaded; nothing has changed.
        """
        await self._load(record)
        self._own[record.name] = record
        self.expect(self._wanted)

    def published(self) -> dict[str, AdapterRecord]:
        """What is wanted because it was published."""
        return {name: record for name, record in self._wanted.items() if name not in self._own}

    def discard(self, name: str) -> None:
        """Serve no more what was added."""
        del self._own[name]
        self._wanted = {one: record for one, record in self._wanted.items() if one != name}
        self._failed.pop(name, None)
        if name in self._loaded:
            self._unload(self._loaded.pop(name))

    async def sync(self, records: Mapping[str, AdapterRecord]) -> tuple[str, ...]:
        """Load what is new, drop what has gone. Returns the names whose version is not loaded."""
        self.expect(records)
        for name, record in list(self._wanted.items()):
            self._gone_since_s.pop(name, None)
            failed = self._failed.get(name)
            if not self._has(record) and (failed is None or failed.retry_at_s <= self._now_s()):
                await self._try_load(record)
        for name in [name for name in self._loaded if name not in self._wanted]:
            since_s = self._gone_since_s.setdefault(name, self._now_s())
            if self._now_s() - since_s >= REMOVE_AFTER_S:
                del self._gone_since_s[name]
                self._unload(self._loaded.pop(name))
        return self._missing()

    def _missing(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, record in self._wanted.items() if not self._has(record)))

    def _has(self, record: AdapterRecord) -> bool:
        loaded = self._loaded.get(record.name)
        return loaded is not None and loaded.record.sha256 == record.sha256 and loaded.record.number == record.number

    async def _try_load(self, record: AdapterRecord) -> None:
        if record.name == self._base.name:
            self._give_up(record, "it has the base model's name and cannot be served; publish it under another")
            return
        try:
            await self._load(record)
        except (CheckpointError, AdapterLoadError, EngineGoneError, OSError) as error:
            self._give_up(record, str(error))

    async def _load(self, record: AdapterRecord) -> None:
        name, folder = record.name, self._artifacts / record.path
        # The checksum is part of the identity: a number that was used twice still names two versions.
        version = AdapterVersion(f"{name}@{record.sha256[:16]}", record.number)
        await asyncio.to_thread(verify_folder, folder, record.sha256, self._artifacts)
        variables = await asyncio.to_thread(variables_of, folder)
        await self.shelf.put(version, str(folder))
        old = self._loaded.get(name)
        served = Served(
            name, version, str(folder), int(time.time()), self._base.name, {**self._base.variables, **variables}
        )
        self._loaded[name] = Loaded(record, version, served)
        self._failed.pop(name, None)
        log.info("adapter %s v%d: loaded from %s", name, record.number, folder)
        if old is not None:
            self._unload(old)

    def _give_up(self, record: AdapterRecord, why: str) -> None:
        before = self._failed.get(record.name)
        tries = 1 if before is None else before.tries + 1
        wait_s = min(LONGEST_RETRY_S, RETRY_S * 2 ** min(tries - 1, 10))
        reason = why.encode("utf-8", "backslashreplace").decode()[:MOST_REASON]
        self._failed[record.name] = Failed(record, tries, reason, self._now_s() + wait_s)
        log.error("adapter %s v%d: not loaded, tried again in %g s: %s", record.name, record.number, wait_s, reason)

    def _unload(self, loaded: Loaded) -> None:
        log.info("adapter %s v%d: unloaded", loaded.record.name, loaded.record.number)
        self.shelf.drop(loaded.version)
