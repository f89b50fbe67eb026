"""Typed access to what lies under the keys, without fencing: what agents, feeders and the operator read, and what has
one writer anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from redis.asyncio import Redis

from coserve_api.errors import InvalidValueError, MessageError, ShardError
from coserve_contract import lua
from coserve_contract.connect import command, run_script
from coserve_contract.keys import ENDPOINT_INDEX, Keys
from coserve_contract.message import loaded
from coserve_contract.messages import (
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
from coserve_contract.scripts import Fence, Refused, bindings_of, load_fence, seen_fence, write_led
from coserve_contract.shards import Shard, decode_shard, encode_shard

T = TypeVar("T")
SCAN = 1000
MOST_AGENTS = 1024
"""Of an endpoint, those that were lost and not yet swept included."""
SHARD_BOUND = 32
"""The feeder keeps at most this many shards of each stream ahead of what the agent has read."""
WINDOW_BYTES = 32 * 2**20
"""Nor more bytes than these, but for a single shard."""


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
    """All that Redis knows of a job. `last_shard` is the last shard in the stream or covered by the checkpoint;
    `streamed` counts what both streams hold, for the operator.
    """

    fence: Fence | None = None
    owner: str | None = None
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    result: Completed | Failed | Released | None = None
    feed: FeedStatus | None = None
    last_shard: int = 0
    streamed: int = 0
    broken: tuple[MessageError, ...] = field(default=())


class Reading(Protocol):
    """What stands under `key`, by `load`; None for nothing, and for what does not read, which it keeps."""

    def __call__(self, load: Callable[[str, Any], T | None], key: str, raw: Any) -> T | None: ...


def job_record(read: Reading, keys: Sequence[str], answers: Sequence[Any]) -> JobRecord:
    """A record from the keys of a job and the answers of `lua.JOB`."""
    fence, owner, checkpoint, progress, result, held, held_out, feed = map(read, _LOADS, keys, answers)
    held, held_out = held or 0, held_out or 0
    return JobRecord(
        fence=fence,
        owner=owner,
        checkpoint=checkpoint,
        progress=progress,
        result=result,
        feed=feed,
        last_shard=(checkpoint.cursor if checkpoint else 0) + held,
        streamed=held + held_out,
    )


def _load_owner(_: str, raw: bytes) -> str:
    return raw[:200].decode(errors="replace")


def _length(_: str, raw: int) -> int:
    return raw


_LOADS: tuple[Callable[[str, Any], Any], ...] = (
    load_fence,
    _load_owner,
    Checkpoint.loads,
    Progress.loads,
    load_result,
    _length,
    _length,
    FeedStatus.loads,
)
"""Of OF_JOB."""


@dataclass(frozen=True)
class Store:
    """The keys of one endpoint. What the operator writes is under its fencing `token`: Refused says that an operator
    with a greater one has written.
    """

    redis: Redis
    keys: Keys
    token: int = 0

    # ---- the endpoint ----

    async def incarnation(self) -> str | None:
        """The current incarnation, None in an emptied Redis."""
        raw = await command(self.redis, "GET", self.keys.incarnation())
        return None if raw is None else str(raw.decode())

    async def set_incarnation(self, value: str) -> Refused | None:
        """Operator: agents must register again. Write it after the fences have been bound again."""
        await command(self.redis, "SADD", ENDPOINT_INDEX, self.keys.endpoint_uid)
        return await self._led(lua.SET_INCARNATION, [self.keys.incarnation()], [value])

    async def fleet(self) -> Fleet:
        """The agents whose heartbeat has not run out, of the MOST_AGENTS that were heard of last."""
        agents, keys, broken = {}, {}, []
        for name in await command(self.redis, "ZRANGE", self.keys.agents(), 0, MOST_AGENTS - 1, "REV"):
            agent = name[:200].decode(errors="replace")
            try:
                keys[agent] = self.keys.agent(agent)
            except InvalidValueError as error:
                broken.append(MessageError(self.keys.agents(), "", repr(agent), str(error)))
        if not keys:
            return Fleet({}, tuple(broken))
        answers = await command(self.redis, "MGET", *keys.values())
        for (agent, key), raw in zip(keys.items(), answers, strict=True):
            if raw is None:
                continue
            try:
                agents[agent] = Heartbeat.loads(key, raw)
            except MessageError as error:
                broken.append(error)
        return Fleet(agents, tuple(broken))

    async def adapters(self) -> dict[str, AdapterRecord]:
        """The versions that agents are to serve, by name, as far as they read."""
        return (await self.published())[0]

    async def published(self) -> tuple[dict[str, AdapterRecord], tuple[MessageError, ...]]:
        """The versions that agents are to serve, by name, and those that do not read."""
        key = self.keys.adapters()
        rows = ((name, f"{key}[{name}]", raw) for name, raw in await self._hash(key))
        return loaded(AdapterRecord.loads, rows)

    async def set_adapters(self, records: Iterable[AdapterRecord]) -> Refused | None:
        """Operator: these are the published versions, and no others."""
        flat = [part for record in records for part in (record.name, record.dumps())]
        return await self._led(lua.SET_ADAPTERS, [self.keys.adapters()], flat)

    async def bindings(self, agent: str) -> tuple[dict[str, Binding], tuple[MessageError, ...]]:
        """What `agent` should run, by job uid, and the bindings that do not read."""
        key = self.keys.bindings(agent)
        rows = ((job, f"{key}[{job}]", raw) for job, raw in await self._hash(key))
        return loaded(Binding.loads, rows)

    # ---- a job ----

    async def job(self, job: str) -> JobRecord:
        """All that Redis knows of a job, at one moment; messages that do not read are absent, and in `broken`."""
        keys = self.keys.all_of_job(job)
        answers = await run_script(self.redis, lua.JOB, keys, [])
        broken: list[MessageError] = []

        def read(load: Callable[[str, Any], T | None], key: str, raw: Any) -> T | None:
            try:
                return None if raw is None else load(key, raw)
            except MessageError as error:
                broken.append(error)
                return None

        record = job_record(read, keys, answers)
        return replace(record, broken=tuple(broken))

    async def job_uids(self) -> frozenset[str]:
        """Jobs with keys here."""
        return frozenset(raw.decode() for raw in await command(self.redis, "SMEMBERS", self.keys.jobs()))

    async def delete_job(self, job: str) -> Refused | None:
        """Operator: the job's object is gone, and so is everything here."""
        _, fence = await seen_fence(self.redis, self.keys, job)
        told = bindings_of(self.keys, fence, self.keys.fence(job))
        keys = [self.keys.jobs(), told, *self.keys.all_of_job(job)]
        return await self._led(lua.FORGET, keys, [job])

    async def clear_streams(self, job: str) -> Refused | None:
        """Operator: nobody reads the job's shards, and they may be pushed again."""
        return await self._led(lua.DROP, [self.keys.shards(job), self.keys.eval(job)], [])

    async def delete_endpoint(self) -> Refused | None:
        """Operator: the endpoint's object is gone, and so is everything under its prefix, whoever wrote it."""
        cursor = b"0"
        while True:
            scan = ("SCAN", cursor, "MATCH", f"{self.keys.prefix}*", "COUNT", SCAN)
            cursor, found = await command(self.redis, *scan)
            refused = await self._led(lua.DROP, found, [])
            if refused is not None:
                return refused
            if int(cursor) == 0:
                break
        await command(self.redis, "SREM", ENDPOINT_INDEX, self.keys.endpoint_uid)
        return await self._led(lua.DROP, [self.keys.token()], [])

    async def _led(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Refused | None:
        refused: Refused | None = await write_led(self.redis, self.keys, self.token, script, keys, values)
        return refused

    # ---- shards ----

    async def feed(self, job: str) -> FeedStatus | None:
        """What the feeder knows of the data."""
        key = self.keys.feed(job)
        raw = await command(self.redis, "GET", key)
        return None if raw is None else FeedStatus.loads(key, raw)

    async def set_feed(self, job: str, status: FeedStatus) -> None:
        """Feeder: say what is known of the data."""
        await run_script(self.redis, lua.SET_FEED, [self.keys.feed(job), self.keys.changed()], [status.dumps()])

    async def push_shard(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed:
        """Feeder: append training shard `shard.seq`, unless it is there, an earlier one is missing, or enough is
        unread. May be sent again. MessageError where the checkpoint does not read.
        """
        checkpoint, progress = self.keys.checkpoint(job), self.keys.progress(job)
        while True:
            seen, said = await command(self.redis, "MGET", checkpoint, progress)
            cursor = Checkpoint.loads(checkpoint, seen).cursor if seen else 0
            room = max(cursor, _cursor_read(said)) + bound
            values = [shard.seq, seen or "", cursor, room, *_flat(shard)]
            reply = await run_script(self.redis, lua.PUSH_SHARD, [self.keys.shards(job), checkpoint], values)
            if reply[0] != b"changed":
                return Pushed(Push(reply[0].decode()), int(reply[1]))

    async def push_eval(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed:
        """Feeder: append held-out shard `shard.seq`, as `push_shard` does; `bound` counts from what the agent keeps."""
        keys = [self.keys.eval(job), self.keys.fence(job), self.keys.progress(job)]
        while True:
            (epoch,) = await command(self.redis, "HMGET", self.keys.fence(job), "epoch")
            said = await command(self.redis, "GET", self.keys.progress(job))
            kept, whole = _kept(epoch, said)
            room = 2**53 if whole else kept + bound
            values = [shard.seq, epoch or "", said or "", kept, room, *_flat(shard)]
            reply = await run_script(self.redis, lua.PUSH_EVAL, keys, values)
            if reply[0] != b"changed":
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


def _cursor_read(progress: bytes | None) -> int:
    """The last shard that an agent says it has read."""
    try:
        return Progress.loads("", progress).cursor if progress else 0
    except MessageError:
        return 0


def _kept(epoch: bytes | None, progress: bytes | None) -> tuple[int, bool]:
    """The last held-out shard that the bound agent says it has in its own keeping, and whether it is one of the version
    before: that says none, and reads the whole stream at each evaluation.
    """
    try:
        said = Progress.loads("", progress) if progress else None
    except MessageError:
        return 0, False
    if said is None or epoch != b"%d" % said.epoch:
        return 0, False
    return said.eval_cursor or 0, said.eval_cursor is None


def _flat(shard: Shard) -> list[str | bytes]:
    return [part for name, value in encode_shard(shard).items() for part in (name, value)]


async def changes(redis: Redis, uids: Sequence[str], age_ms: int) -> list[tuple[Any, bool]]:
    """Operator: of each endpoint its mark, which is another where it should be looked at, and whether an agent's last
    heartbeat is that old. What is of another type is the error that says so.
    """
    keys = [key for uid in uids for key in (Keys(uid).changed(), Keys(uid).agents())]
    found = await run_script(redis, lua.CHANGES, keys, [age_ms])
    said = [str(each) if isinstance(each, Exception) else each for each in found]
    return [(mark, lost != 0) for mark, lost in zip(said[::2], said[1::2], strict=True)]


async def endpoint_uids(redis: Redis) -> frozenset[str]:
    """Operator: the endpoints with keys in this Redis."""
    return frozenset(raw.decode() for raw in await command(redis, "SMEMBERS", ENDPOINT_INDEX))
