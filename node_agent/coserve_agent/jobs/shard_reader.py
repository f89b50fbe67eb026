"""Shards from Redis a few steps ahead of the driver. Reading changes nothing there, so a lost lease can take nothing
away. Held-out samples are read once, into a file of the job's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.held_out import HeldOut
from coserve_api.errors import ShardError
from coserve_api.job_status import FailedReason
from coserve_contract.away import STORE_AWAY
from coserve_contract.protocols import JobStore
from coserve_contract.shards import Sample, Shard

log = logging.getLogger(__name__)

AHEAD = 8
MIN_WAIT_S = 0.05
MAX_WAIT_S = 1.0


class ShardReader:
    """The shards of one job from number `after` + 1 on. `on_arrival` is called when one has arrived.

    Args:
        held_out: the file of the held-out samples.
        windowed: whether they may be deleted from Redis as `eval_cursor` grows.
        digest: of the agent's tokenizer and chat template; shards made with others are refused.
    """

    def __init__(
        self,
        store: JobStore,
        job: str,
        *,
        after: int,
        total: int,
        held_out: HeldOut,
        windowed: bool,
        digest: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._job = job
        self._total = total
        self._held_out = held_out
        self._windowed = windowed
        self._kept = 0
        self.kept_more = asyncio.Event()
        """Set when `eval_cursor` has grown."""
        self._digest = digest
        self.on_arrival: Callable[[], None] = lambda: None
        self._sleep = sleep
        self._shards: dict[int, Shard] = {}
        self._wanted = after + 1
        self._room = asyncio.Event()
        self.last_read = after

    def get(self, number: int) -> Shard | None:
        if number > self._wanted:
            for old in range(self._wanted, number):
                self._shards.pop(old, None)
            self._wanted = number
            self._room.set()
        return self._shards.get(number)

    async def run(self) -> None:
        """Read ahead until the last shard is here. Raises JobFailedError for a shard that cannot be used."""
        wait_s = MIN_WAIT_S
        while self.last_read < self._total:
            room = self._wanted + AHEAD - 1 - self.last_read
            if room <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            shards = await self._read(partial(self._store.read_shards, self._job, self.last_read, room))
            for shard in shards:
                self._shards[shard.seq] = shard
                self.last_read = shard.seq
            if shards:
                wait_s = MIN_WAIT_S
                self.on_arrival()
            else:
                await self._sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)

    @property
    def eval_cursor(self) -> int | None:
        """The last held-out shard that need not stay in Redis; None where all must."""
        return self._kept if self._windowed else None

    async def look_for_held_out(self) -> None:
        """Whether the file is there already, from an agent before."""
        if self._held_out.shards and await asyncio.to_thread(self._held_out.is_whole):
            self._kept = self._held_out.shards

    async def eval_samples(self) -> Iterable[Sample]:
        """All held-out samples, waiting for the feeder where they are not kept yet. Iterating reads the file."""
        if not self._held_out.shards:
            return ()
        if self._kept < self._held_out.shards:
            try:
                await self._keep_held_out()
            except OSError as error:
                raise JobFailedError(
                    FailedReason.ARTIFACT_STORE_ERROR, f"the held-out samples cannot be kept: {error}"
                ) from None
        return self._held_out.samples()

    async def _keep_held_out(self) -> None:
        await asyncio.to_thread(self._held_out.begin)
        after, wait_s = 0, MIN_WAIT_S
        while after < self._held_out.shards:
            shards = await self._read(partial(self._store.read_eval, self._job, after))
            if not shards:
                await self._sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
                continue
            await asyncio.to_thread(self._held_out.append, shards)
            after, wait_s = shards[-1].seq, MIN_WAIT_S
            if after < self._held_out.shards:
                self._keep(after)
        await asyncio.to_thread(self._held_out.finish)
        self._keep(after)

    def _keep(self, number: int) -> None:
        self._kept = number
        self.kept_more.set()

    async def _read(self, read: Callable[[], Awaitable[list[Shard]]]) -> list[Shard]:
        try:
            shards = await read()
        except STORE_AWAY as error:
            log.warning("job %s: shards cannot be read for now: %s", self._job, error)
            await self._sleep(MAX_WAIT_S)
            return []
        except ShardError as error:
            raise JobFailedError(
                FailedReason.INTERNAL_ERROR, f"a shard in Redis cannot be used: {error}; create the job again"
            ) from None
        for shard in shards:
            if shard.digest != self._digest:
                raise JobFailedError(
                    FailedReason.INTERNAL_ERROR,
                    f"shard {shard.seq} was made with another tokenizer or chat template ({shard.digest[:12]}, this "
                    f"agent has {self._digest[:12]}); the model folder was changed: create endpoint and job again",
                )
        return shards
