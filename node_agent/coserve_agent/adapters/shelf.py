"""The adapter versions that the engine has: at most so many bytes of them. What no request has used for longest makes
room for others; its folder stays, and so it can be had again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

from coserve_agent.engine.client import AdapterLoadError, EngineClient
from coserve_engine.messages import AdapterVersion

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
PATIENCE_S = 0.25


class Shelf:
    """`most_bytes` None: as many as there are. A version that was never loaded is taken to need what its file has."""

    def __init__(
        self, engine: EngineClient, most_bytes: int | None = None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._now_s = now_s
        self._most_bytes = most_bytes
        self._held: OrderedDict[AdapterVersion, int] = OrderedDict()
        """Bytes of those that the engine has, the least recently used first."""
        self._sizes: dict[AdapterVersion, int] = {}
        """Also of those that made room."""
        self._uses: Counter[AdapterVersion] = Counter()
        self._loads: dict[AdapterVersion, asyncio.Task[None]] = {}
        self._coming_bytes = 0
        self._waits_since_s: list[float] = []
        """Of loads that wait for room, the oldest first."""
        self._changed = asyncio.Event()

    @property
    def bytes(self) -> int:
        """That it holds now."""
        return sum(self._held.values())

    def has(self, version: AdapterVersion) -> bool:
        return version in self._held

    async def put(self, version: AdapterVersion, folder: str) -> None:
        """Have the engine load it, once there is room for it.

        Raises:
            AdapterLoadError: the folder is no adapter for this model, or larger than all there is room for.
            EngineGoneError: the engine ended.
        """
        if version not in self._held:
            task = self._loads.get(version)
            if task is None:
                task = self._loads[version] = asyncio.create_task(self._load(version, folder))
                task.add_done_callback(lambda ended: self._ended(version, ended))
            await asyncio.shield(task)

    async def take(self, version: AdapterVersion, folder: str) -> None:
        """As `put`, for a request that begins on it: it stays until `let_go`. One that many ask for steps back where
        others have waited for room for PATIENCE_S.
        """
        while self._waits_since_s and self._now_s() - self._waits_since_s[0] > PATIENCE_S:
            self._changed.clear()
            await self._changed.wait()
        self._uses[version] += 1
        try:
            await self.put(version, folder)
        except BaseException:
            self.let_go(version)
            raise
        self._held.move_to_end(version)

    def drop(self, version: AdapterVersion) -> None:
        """It is not served any more; requests that run on it finish on it."""
        self._sizes.pop(version, None)
        loading = self._loads.get(version)
        if loading is not None:
            loading.add_done_callback(lambda _: self.drop(version))
        elif version in self._held:
            self._take_out(version)

    def let_go(self, version: AdapterVersion) -> None:
        """A request on it has ended."""
        self._uses[version] -= 1
        if self._uses[version] <= 0:
            del self._uses[version]
            self._changed.set()

    async def _load(self, version: AdapterVersion, folder: str) -> None:
        size = self._sizes.get(version) or _file_bytes(folder)
        self._check(size, folder)
        await self._have_room(size)
        self._coming_bytes += size
        try:
            loaded = await self._engine.load_adapter(version, folder)
        finally:
            self._coming_bytes -= size
            self._changed.set()
        self._sizes[version] = self._held[version] = loaded.bytes
        try:
            self._check(loaded.bytes, folder)
        except AdapterLoadError:
            self._take_out(version)
            raise
        self._make_room(0, but=version)

    def _check(self, size: int, folder: str) -> None:
        if self._most_bytes is not None and size > self._most_bytes:
            raise AdapterLoadError(
                f"{folder}: takes {size} bytes, and all adapters that are loaded may take {self._most_bytes}: raise "
                "the memory for adapters"
            )

    async def _have_room(self, size: int) -> None:
        """Whoever waits first is first."""
        since_s = self._now_s()
        self._waits_since_s.append(since_s)
        try:
            while self._waits_since_s[0] < since_s or not self._make_room(size):
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._waits_since_s.remove(since_s)
            self._changed.set()

    def _make_room(self, size: int, but: AdapterVersion | None = None) -> bool:
        """Put out what no request uses until there is room for so much more; False where there is not."""
        if self._most_bytes is None:
            return True
        idle = [version for version in self._held if version not in self._uses and version != but]
        while self.bytes + self._coming_bytes + size > self._most_bytes and idle:
            log.info("adapter %s: makes room for others", idle[0].uid)
            self._take_out(idle.pop(0))
        return self.bytes + self._coming_bytes + size <= self._most_bytes

    def _take_out(self, version: AdapterVersion) -> None:
        del self._held[version]
        if self._engine.alive:
            self._engine.unload_adapter(version)
        self._changed.set()

    def _ended(self, version: AdapterVersion, task: asyncio.Task[None]) -> None:
        del self._loads[version]
        if not task.cancelled():
            task.exception()  # seen: whoever asked may have gone


def _file_bytes(folder: str) -> int:
    try:
        return (Path(folder) / WEIGHTS).stat().st_size
    except OSError:
        return 0  # the engine says what is wrong with it
