"""Typed access to what lies under the keys, without fencing: what agents, feeders and the operator read, and what has
one writer anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis

from coserve_api import lua
from coserve_api.connect import command, run_script
from coserve_api.errors import MessageError, ShardError
from coserve_api.keys import ENDPOINT_INDEX, Keys
from coserve_api.messages import (
    AdapterRecord,
    Binding,
    Checkpoint,
    Completed,
    Failed,
    FeedStatus,
    Heartbeat,
    Progress,
    Released,
    load_result,
)
from coserve_api.scripts import Fence
from coserve_api.shards import Shard, decode_shard, encode_shard

SHARD_BOUND = 32
"""The feeder keeps at most this many shards ahead of what the agent has read."""


class Push(StrEnum):
    """What became of a pushed shard."""

    ADDED = "ok"
    PRESENT = "present"
    """It is in the stream, or covered by the checkpoint."""
    FULL = "full"
    """The agent has SHARD_BOUND shards left to read: wait."""
    GAP = "gap"
    """The stream lacks an earlier one (Redis was emptied, or the job rewound): go on with `last` + 1."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """`last` is the number of the last shard in the stream or covered by the checkpoint."""

    outcome: Push
    last: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """Live agents of an endpoint by id. `broken` are heartbeats that do not read; those agents are alive, but nothing
    is known of them.
    """

    agents: Mapping[str, Heartbeat]
    broken: tuple[MessageError, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRecord:
    """All that Redis knows of a job. `last_shard` is the last shard in the stream or covered by the checkpoint."""

    fence: Fence | None = None
    owner: str | None = None
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    result: Completed | Failed | Released | None = None
    feed: FeedStatus | None = None
    last_shard: int = 0
    broken: tuple[MessageError, ...] = field(default=())


@dataclass(frozen=True)
class Store:
    """The keys of one endpoint."""

    redis: Redis
    keys: Keys

    # ---- the endpoint ----

    async def incarnation(self) -> str | None:
        """The current incarnation, None in an emptied Redis."""
        raw = await command(self.redis, "GET", self.keys.incarnation())
        return None if raw is None else str(raw.decode())

    async def set_incarnation(self, value: str) -> None:
        """Operator: agents must register again. Write it after the fences have been bound again."""
        await command(self.redis, "SET", self.keys.incarnation(), value)
        await command(self.redis, "SADD", ENDPOINT_INDEX, self.keys.endpoint_uid)

    async def fleet(self) -> Fleet:
        """The agents whose heartbeat has not run out."""
        ids = [raw.decode() for raw in await command(self.redis, "ZRANGE", self.keys.agents(), 0, -1)]
        if not ids:
            return Fleet({})
        agents, broken = {}, []
        keys = [self.keys.agent(agent) for agent in ids]
        for agent, key, raw in zip(ids, keys, await command(self.redis, "MGET", *keys), strict=True):
            if raw is None:
                continue
            try:
                agents[agent] = Heartbeat.loads(key, raw)
            except MessageError as error:
                broken.append(error)
        return Fleet(agents, tuple(broken))

    async def adapters(self) -> dict[str, AdapterRecord]:
        """The published versions by name."""
        key = self.keys.adapters()
        return {name: AdapterRecord.loads(f"{key}[{name}]", raw) for name, raw in await self._hash(key)}

    async def set_adapters(self, records: Iterable[AdapterRecord]) -> None:
        """Operator: these are the published versions, and no others."""
        key, wanted = self.keys.adapters(), {record.name: record.dumps() for record in records}
        gone = [name for name, _ in await self._hash(key) if name not in wanted]
        if wanted:
            await command(self.redis, "HSET", key, *(part for item in wanted.items() for part in item))
        if gone:
            await command(self.redis, "HDEL", key, *gone)

    async def bindings(self, agent: str) -> tuple[dict[str, Binding], tuple[MessageError, ...]]:
        """What `agent` should run, by job uid, and the bindings that do not read."""
        key = self.keys.bindings(agent)
        bindings, broken = {}, []
        for job, raw in await self._hash(key):
            try:
                bindings[job] = Binding.loads(f"{key}[{job}]", raw)
            except MessageError as error:
                broken.append(error)
        return bindings, tuple(broken)

    # ---- a job ----

    async def job(self, job: str) -> JobRecord:
        """All that Redis knows of a job, at one moment; messages that do not read are absent, and in `broken`."""
        names = [method(job) for method in (self.keys.checkpoint, self.keys.progress, self.keys.result, self.keys.feed)]
        keys = [self.keys.fence(job), self.keys.shards(job), self.keys.owner(job), *names]
        (epoch, agent), length, (owner, *raws) = await run_script(self.redis, lua.JOB, keys, [])
        broken: list[MessageError] = []
        parsers = (Checkpoint.loads, Progress.loads, load_result, FeedStatus.loads)
        values: list[Any] = []
        for key, raw, parse in zip(names, raws, parsers, strict=True):
            try:
                values.append(None if raw is None else parse(key, raw))
            except MessageError as error:
                values.append(None)
                broken.append(error)
        checkpoint, progress, result, feed = values
        return JobRecord(
            fence=None if epoch is None else Fence(int(epoch), (agent or b"").decode()),
            owner=None if owner is None else owner.decode(),
            checkpoint=checkpoint,
            progress=progress,
            result=result,
            feed=feed,
            last_shard=(checkpoint.cursor if checkpoint else 0) + length,
            broken=tuple(broken),
        )

    async def job_uids(self) -> frozenset[str]:
        """Jobs with keys here."""
        return frozenset(raw.decode() for raw in await command(self.redis, "SMEMBERS", self.keys.jobs()))

    async def delete_job(self, job: str) -> None:
        """Operator: the job's object is gone, and so is everything here."""
        epoch_agent = await command(self.redis, "HMGET", self.keys.fence(job), "epoch", "agent")
        agent = (epoch_agent[1] or b"").decode()
        await command(self.redis, "DEL", *self.keys.all_of_job(job))
        if agent:
            await command(self.redis, "HDEL", self.keys.bindings(agent), job)
        await command(self.redis, "SREM", self.keys.jobs(), job)

    async def delete_endpoint(self) -> None:
        """Operator: the endpoint's object is gone, and so is everything here."""
        for job in await self.job_uids():
            await self.delete_job(job)
        agents = [raw.decode() for raw in await command(self.redis, "ZRANGE", self.keys.agents(), 0, -1)]
        gone = [key for agent in agents for key in (self.keys.agent(agent), self.keys.bindings(agent))]
        keys = self.keys
        await command(self.redis, "DEL", keys.agents(), keys.adapters(), keys.jobs(), keys.incarnation(), *gone)
        await command(self.redis, "SREM", ENDPOINT_INDEX, keys.endpoint_uid)

    # ---- shards ----

    async def feed(self, job: str) -> FeedStatus | None:
        """What the feeder knows of the data."""
        key = self.keys.feed(job)
        raw = await command(self.redis, "GET", key)
        return None if raw is None else FeedStatus.loads(key, raw)

    async def set_feed(self, job: str, status: FeedStatus) -> None:
        """Feeder: say what is known of the data."""
        await command(self.redis, "SET", self.keys.feed(job), status.dumps())

    async def push_shard(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed:
        """Feeder: append training shard `shard.seq`, unless it is there, an earlier one is missing, or enough is
        unread. May be sent again.
        """
        keys = [self.keys.shards(job), self.keys.checkpoint(job), self.keys.progress(job)]
        reply = await run_script(self.redis, lua.PUSH_SHARD, keys, [shard.seq, bound, *_flat(shard)])
        return Pushed(Push(reply[0].decode()), int(reply[1]))

    async def push_eval(self, job: str, shard: Shard) -> Pushed:
        """Feeder: append held-out shard `shard.seq`."""
        reply = await run_script(self.redis, lua.PUSH_EVAL, [self.keys.eval(job)], [shard.seq, *_flat(shard)])
        return Pushed(Push(reply[0].decode()), int(reply[1]))

    async def read_shards(self, job: str, after: int, count: int = 1) -> list[Shard]:
        """Up to `count` training shards from number `after` + 1 on; none if they are not there yet. ShardError for a
        corrupt one.

        Reading changes nothing, so that an agent that lost the job cannot take shards from the one that has it.
        """
        return await self._read(self.keys.shards(job), after, count)

    async def read_eval(self, job: str, after: int = 0, count: int = 16) -> list[Shard]:
        """Up to `count` held-out shards from number `after` + 1 on."""
        return await self._read(self.keys.eval(job), after, count)

    async def _read(self, key: str, after: int, count: int) -> list[Shard]:
        shards: list[Shard] = []
        for number, entry in await command(self.redis, "XRANGE", key, f"({after}-0", "+", "COUNT", count):
            shard = decode_shard(entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True)))
            if number != f"{after + len(shards) + 1}-0".encode() or not number.startswith(b"%d-" % shard.seq):
                raise ShardError(
                    "seq", f"is {shard.seq} under the ID {number.decode()}, and {after + len(shards) + 1} is next"
                )
            shards.append(shard)
        return shards

    async def _hash(self, key: str) -> list[tuple[str, bytes]]:
        raw = await command(self.redis, "HGETALL", key)
        items = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
        return [(name.decode(), value) for name, value in items]


def _flat(shard: Shard) -> list[str | bytes]:
    return [part for name, value in encode_shard(shard).items() for part in (name, value)]


async def endpoint_uids(redis: Redis) -> frozenset[str]:
    """Operator: the endpoints with keys in this Redis."""
    return frozenset(raw.decode() for raw in await command(redis, "SMEMBERS", ENDPOINT_INDEX))
