"""Agents and feeders of the version before and of this one go on with each other's work in one Redis."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

from coserve_contract.connect import command, run_script
from coserve_contract.messages import Completed, Desired, Released
from coserve_contract.scripts import Fence, Lease
from coserve_contract.shards import encode_shard
from coserve_contract.store import Push

JOB = "job-1"
BEFORE = run_path(str(Path(__file__).with_name("scripts_before.py")))
SHA = "0123456789abcdef" * 4
CHECKPOINT = f'{{"version":1,"step":4,"cursor":4,"epoch":3,"path":"jobs/job-1/e3/s4","sha256":"{SHA}"}}'
PROGRESS = '{"version":1,"epoch":3,"step":5,"cursor":5,"total_steps":100,"tokens":0,"evaluations":[],"rewound":""}'


class Before:
    """An agent and a feeder of the version before."""

    def __init__(self, world: Any, agent: str) -> None:
        self.world, self.agent, self.keys = world, agent, world.keys

    async def _guarded(self, name: str, epoch: int, more: list[str], *values: Any) -> list[Any]:
        keys = [self.keys.incarnation(), self.keys.fence(JOB), self.keys.owner(JOB), *more]
        reply = await run_script(self.world.redis, BEFORE[name], keys, ["first", self.agent, epoch, *values])
        return [part.decode() for part in reply]

    async def take_lease(self, epoch: int) -> list[Any]:
        more = [self.keys.checkpoint(JOB), self.keys.result(JOB), self.keys.shards(JOB)]
        return await self._guarded("TAKE_LEASE", epoch, more, 10_000)

    async def accept(self, epoch: int, checkpoint: Any) -> list[Any]:
        more = [self.keys.checkpoint(JOB), self.keys.shards(JOB)]
        return await self._guarded("ACCEPT_CHECKPOINT", epoch, more, checkpoint.dumps())

    async def push(self, shard: Any) -> list[Any]:
        keys = [self.keys.shards(JOB), self.keys.checkpoint(JOB), self.keys.progress(JOB)]
        flat = [part for item in encode_shard(shard).items() for part in item]
        return list(await run_script(self.world.redis, BEFORE["PUSH_SHARD"], keys, [shard.seq, 32, *flat]))


async def test_this_version_goes_on_with_what_the_one_before_has_written(world: Any, messages: Any) -> None:
    keys, redis = world.keys, world.redis
    await command(redis, "SADD", keys.jobs(), JOB)
    await command(redis, "HSET", keys.fence(JOB), "epoch", "3", "agent", world.a.agent)
    await command(redis, "HSET", keys.bindings(world.a.agent), JOB, messages.binding(3).dumps())
    await command(redis, "SET", keys.owner(JOB), f"{world.a.agent}:3", "PX", 10_000)
    await command(redis, "SET", keys.checkpoint(JOB), CHECKPOINT)
    await command(redis, "SET", keys.progress(JOB), PROGRESS)
    for seq in (5, 6):
        assert (await world.store.push_shard(JOB, messages.shard(seq))).outcome is Push.ADDED
    assert await world.a.renew_lease(JOB, 3) is None
    assert await world.a.take_lease(JOB, 3) == Lease(messages.checkpoint(4, 3))
    assert await world.a.accept_checkpoint(JOB, 3, messages.checkpoint(5, 3)) is None
    stop = messages.binding(3, desired=Desired.STOP)
    assert await world.binder.rebrief(JOB, world.a.agent, stop) is None
    assert await world.a.finish(JOB, Released(epoch=3, step=5)) is None
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(4)) is None
    assert await world.b.take_lease(JOB, 4) == Lease(messages.checkpoint(5, 3))
    assert [shard.seq for shard in await world.store.read_shards(JOB, 5)] == [6]


async def test_what_this_version_writes_is_what_the_one_before_reads(world: Any, messages: Any) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(3, resume=messages.checkpoint(4, 3)))
    await world.a.take_lease(JOB, 3)
    keys, redis = world.keys, world.redis
    assert await command(redis, "HMGET", keys.fence(JOB), "epoch", "agent") == [b"3", world.a.agent.encode()]
    assert await command(redis, "GET", keys.owner(JOB)) == f"{world.a.agent}:3".encode()
    assert await command(redis, "GET", keys.checkpoint(JOB)) == CHECKPOINT.encode()
    await world.a.report_progress(JOB, messages.progress(3, 5))
    assert await command(redis, "GET", keys.progress(JOB)) == PROGRESS.encode()
    await world.a.finish(JOB, Completed(epoch=3, step=5))
    found = await command(redis, "GET", keys.result(JOB))
    assert found == b'{"version":1,"outcome":"Completed","epoch":3,"step":5,"tokens":0,"evaluations":[]}'


async def test_a_job_goes_to_and_fro_between_agents_and_feeders_of_both(world: Any, messages: Any) -> None:
    old = Before(world, world.b.agent)
    assert await world.binder.bind(JOB, old.agent, messages.binding(1)) is None
    assert await old.take_lease(1) == ["ok", ""]
    assert await old.push(messages.shard(1)) == [b"ok", 1]
    for seq in (2, 3, 4):
        assert (await world.store.push_shard(JOB, messages.shard(seq))).outcome is Push.ADDED
    assert await old.accept(1, messages.checkpoint(2)) == ["ok"]
    assert await world.binder.bind(JOB, world.a.agent, messages.binding(2)) is None
    assert (await old.accept(1, messages.checkpoint(3)))[:3] == ["refused", "stale_epoch", "2"]
    assert await world.a.take_lease(JOB, 2) == Lease(messages.checkpoint(2))
    assert await world.a.accept_checkpoint(JOB, 2, messages.checkpoint(3, 2)) is None
    assert await old.push(messages.shard(5)) == [b"ok", 5]
    assert (await world.store.push_shard(JOB, messages.shard(5))).outcome is Push.PRESENT
    assert await world.binder.bind(JOB, old.agent, messages.binding(3)) is None
    assert await old.take_lease(3) == ["ok", messages.checkpoint(3, 2).dumps()]
    assert (await world.store.job(JOB)).fence == Fence(3, old.agent)
    assert [shard.seq for shard in await world.store.read_shards(JOB, 3, 9)] == [4, 5]
