"""Shards from Redis a few steps ahead of the driver. Reading changes nothing there, so a lost lease can take nothing
away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from redis.exceptions import RedisError

from coserve_agent.errors import JobFailedError
from coserve_api.errors import ShardError
from coserve_api.job import FailedReason
from coserve_api.shards import Sample, Shard
from coserve_api.store import Store

log = logging.getLogger(__name__)

AHEAD = 8
MIN_WAIT_S = 0.05
MAX_WAIT_S = 1.0


class ShardReader:
    """The shards of one job from number `after` + 1 on. `on_arrival` is called when one has arrived.

    Args:
        digest: of the agent's tokenizer and chat template; shards made with others are refused.
    """

    def __init__(
        self,
        store: Store,
        job: str,
        *,
        after: int,
        total: int,
        eval_shards: int,
        digest: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._job = job
        self._total = total
        self._eval_shards = eval_shards
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

    async def eval_samples(self) -> list[Sample]:
        """All held-out samples, waiting for the feeder where it has not pushed them yet."""
        samples: list[Sample] = []
        after, wait_s = 0, MIN_WAIT_S
        while after < self._eval_shards:
            shards = await self._read(partial(self._store.read_eval, self._job, after))
            for shard in shards:
                samples += shard.samples
                after = shard.seq
            if not shards:
                await self._sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
        return samples

    async def _read(self, read: Callable[[], Awaitable[list[Shard]]]) -> list[Shard]:
        try:
            shards = await read()
        except (RedisError, OSError, TimeoutError) as error:
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
