"""Who may write, and what happens to the shards, step by step against a real Redis and a real directory."""

from __future__ import annotations

import asyncio

import pytest
from backends import BOTH

from coserve_contract.connect import command
from coserve_contract.messages import Completed, Desired, Failed, Released
from coserve_contract.scripts import Fence, Lease, Reason, Refused
from coserve_contract.store import Push

JOB = "job-1"


async def bound(world, messages, epoch: int = 1):
    """Agent A has the job and its lease."""
    assert await world.binder.bind(JOB, world.a.agent, messages.binding(epoch)) is None
    lease = await world.a.take_lease(JOB, epoch)
    assert isinstance(lease, Lease)
    return lease


@BOTH
async def test_nothing_is_accepted_before_the_operator_binds(world, messages) -> None:
    assert await world.a.take_lease(JOB, 1) == Refused(Reason.NO_FENCE)
    assert await world.a.report_progress(JOB, messages.progress(1, 0)) == Refused(Reason.NO_FENCE)


@BOTH
async def test_only_the_named_agent_takes_the_lease(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(3))
    assert await world.b.take_lease(JOB, 3) == Refused(Reason.NOT_OWNER, 3, world.a.agent)
    assert await world.a.take_lease(JOB, 2) == Refused(Reason.STALE_EPOCH, 3, world.a.agent)
    assert await world.a.take_lease(JOB, 4) == Refused(Reason.STALE_EPOCH, 3, world.a.agent)
    assert await world.a.take_lease(JOB, 3) == Lease(None)


@BOTH
async def test_a_refusal_reads_as_a_sentence(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(3))
    refused = await world.a.take_lease(JOB, 2)
    assert str(refused) == "refused: stale_epoch (current epoch 3, pod-a.boot-1)"


@BOTH
async def test_every_write_needs_the_lease(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    lost = Refused(Reason.LOST_LEASE, 1, world.a.agent)
    assert await world.a.renew_lease(JOB, 1) == lost
    assert await world.a.report_progress(JOB, messages.progress(1, 1)) == lost
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(1)) == lost
    assert await world.a.rewind(JOB, 1, None) == lost
    assert await world.a.finish(JOB, Completed(epoch=1, step=1)) == lost
    record = await world.store.job(JOB)
    assert (record.progress, record.checkpoint, record.result) == (None, None, None)


async def test_a_lease_runs_out_by_itself_and_the_fence_does_not(world, messages) -> None:
    await bound(world, messages)
    assert await world.a.renew_lease(JOB, 1) is None
    ttl = await command(world.redis, "PTTL", world.keys.owner(JOB))
    assert 0 < ttl <= world.a.lease_ttl_ms == 10_000
    await command(world.redis, "PEXPIRE", world.keys.owner(JOB), 1)  # ten seconds later
    while await command(world.redis, "EXISTS", world.keys.owner(JOB)):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert await world.a.renew_lease(JOB, 1) == Refused(Reason.LOST_LEASE, 1, world.a.agent)
    assert await command(world.redis, "PTTL", world.keys.fence(JOB)) == -1
    assert await world.a.take_lease(JOB, 1) == Lease(None)


@BOTH
async def test_a_new_binding_ends_the_old_agents_rights_at_once(world, messages) -> None:
    await bound(world, messages)
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(2)) is None
    stale = Refused(Reason.STALE_EPOCH, 2, world.b.agent)
    assert await world.a.renew_lease(JOB, 1) == stale
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(9)) == stale
    assert await world.a.take_lease(JOB, 1) == stale
    assert await world.a.take_lease(JOB, 2) == Refused(Reason.NOT_OWNER, 2, world.b.agent)
    assert (await world.store.bindings(world.a.agent))[0] == {}
    assert (await world.store.bindings(world.b.agent))[0] == {JOB: messages.binding(2)}


@BOTH
async def test_an_epoch_is_bound_once(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(5))
    for epoch in (1, 5):
        refused = await world.binder.bind(JOB, world.b.agent, messages.binding(epoch))
        assert refused == Refused(Reason.STALE_EPOCH, 5, world.a.agent)
    assert (await world.store.job(JOB)).fence == Fence(5, world.a.agent)


@BOTH
async def test_an_accepted_checkpoint_drops_the_shards_it_covers_and_is_resumed_from(world, messages) -> None:
    await bound(world, messages)
    for seq in range(1, 6):
        await world.store.push_shard(JOB, messages.shard(seq))
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(3)) is None
    assert [shard.seq for shard in await world.store.read_shards(JOB, 3, 9)] == [4, 5]
    assert await world.store.read_shards(JOB, 5) == []
    await world.binder.bind(JOB, world.b.agent, messages.binding(2))
    assert await world.b.take_lease(JOB, 2) == Lease(messages.checkpoint(3))


@BOTH
async def test_an_older_checkpoint_never_replaces_a_later_one(world, messages) -> None:
    await bound(world, messages)
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(20)) is None
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(20)) is None  # sent again: the reply was lost
    assert await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(10)) == Refused(Reason.BEHIND, 1, "20")
    assert (await world.store.job(JOB)).checkpoint == messages.checkpoint(20)


@BOTH
async def test_a_rewind_goes_back_and_has_the_data_fed_again(world, messages) -> None:
    await bound(world, messages)
    for seq in range(1, 31):
        await world.store.push_shard(JOB, messages.shard(seq))
    await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(20))
    assert await world.a.rewind(JOB, 1, messages.checkpoint(20)) == Refused(Reason.BEHIND, 1, "20")
    assert await world.a.rewind(JOB, 1, messages.checkpoint(10)) is None
    pushed = await world.store.push_shard(JOB, messages.shard(31))
    assert (pushed.outcome, pushed.last) == (Push.GAP, 10)
    assert (await world.store.push_shard(JOB, messages.shard(11))).outcome is Push.ADDED
    assert await world.a.take_lease(JOB, 1) == Lease(messages.checkpoint(10))
    assert await world.a.rewind(JOB, 1, None) is None
    assert await world.a.take_lease(JOB, 1) == Lease(None)


@BOTH
@pytest.mark.parametrize(
    "result", [Completed(epoch=1, step=100), Failed(epoch=1, reason="TrainingDiverged", message="lower learningRate")]
)
async def test_a_finished_job_stays_finished(world, messages, result) -> None:
    await bound(world, messages)
    await world.store.push_shard(JOB, messages.shard(1))
    await world.store.push_eval(JOB, messages.shard(1))
    assert await world.a.finish(JOB, result) is None
    assert await world.a.finish(JOB, result) is None  # sent again: the reply was lost
    record = await world.store.job(JOB)
    assert (record.result, record.owner, record.last_shard) == (result, None, 0)
    assert await world.store.read_eval(JOB) == []
    assert await world.a.take_lease(JOB, 1) == Refused(Reason.FINISHED, 1)
    refused = await world.binder.bind(JOB, world.b.agent, messages.binding(2))
    assert refused == Refused(Reason.FINISHED, 1, world.a.agent)


@BOTH
async def test_a_released_job_goes_on_elsewhere(world, messages) -> None:
    await bound(world, messages)
    await world.store.push_shard(JOB, messages.shard(1))
    assert await world.binder.rebrief(JOB, world.a.agent, messages.binding(1, desired=Desired.STOP)) is None
    bindings, _ = await world.store.bindings(world.a.agent)
    assert bindings[JOB].desired is Desired.STOP
    assert await world.a.finish(JOB, Released(epoch=1, step=0)) is None
    assert await world.a.take_lease(JOB, 1) == Refused(Reason.FINISHED, 1)
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(2)) is None
    assert (await world.store.job(JOB)).result is None
    assert await world.b.take_lease(JOB, 2) == Lease(None)
    assert [shard.seq for shard in await world.store.read_shards(JOB, 0)] == [1]


@BOTH
async def test_a_job_bound_to_nobody_takes_no_writes_and_keeps_its_epoch(world, messages) -> None:
    await bound(world, messages, 4)
    assert await world.binder.unbind(JOB, world.a.agent, 3) == Refused(Reason.STALE_EPOCH, 4, world.a.agent)
    assert await world.binder.unbind(JOB, world.b.agent, 4) == Refused(Reason.NOT_OWNER, 4, world.a.agent)
    assert await world.binder.unbind(JOB, world.a.agent, 4) is None
    assert await world.binder.unbind(JOB, world.a.agent, 4) is None
    assert await world.a.renew_lease(JOB, 4) == Refused(Reason.NOT_OWNER, 4, "")
    assert await world.a.take_lease(JOB, 4) == Refused(Reason.NOT_OWNER, 4, "")
    assert (await world.store.bindings(world.a.agent))[0] == {}
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(4)) == Refused(Reason.STALE_EPOCH, 4, "")
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(5)) is None


@BOTH
async def test_a_binding_is_changed_only_under_its_epoch(world, messages) -> None:
    assert await world.binder.rebrief(JOB, world.a.agent, messages.binding(1)) == Refused(Reason.NO_FENCE)
    await world.binder.bind(JOB, world.a.agent, messages.binding(2))
    stale = await world.binder.rebrief(JOB, world.a.agent, messages.binding(1))
    assert stale == Refused(Reason.STALE_EPOCH, 2, world.a.agent)
    other = await world.binder.rebrief(JOB, world.b.agent, messages.binding(2))
    assert other == Refused(Reason.NOT_OWNER, 2, world.a.agent)


async def test_an_emptied_redis_accepts_nothing_until_the_operator_is_back(world, messages) -> None:
    await bound(world, messages, 6)
    await world.a.accept_checkpoint(JOB, 6, messages.checkpoint(20, 6))
    await command(world.redis, "FLUSHALL")
    assert await world.a.renew_lease(JOB, 6) == Refused(Reason.NO_FENCE)
    assert await world.a.heartbeat(messages.heartbeat(world.a.agent)) == ""
    # the operator binds the same epoch again from status, with the checkpoint that status knows
    binding = messages.binding(6, resume=messages.checkpoint(20, 6))
    assert await world.binder.bind(JOB, world.a.agent, binding) is None
    assert await world.a.take_lease(JOB, 6) == Refused(Reason.INCARNATION, 6)
    await world.store.set_incarnation("second")
    assert await world.a.take_lease(JOB, 6) == Refused(Reason.INCARNATION, 6, "second")
    world.a.register(await world.a.heartbeat(messages.heartbeat(world.a.agent)))
    assert await world.a.renew_lease(JOB, 6) == Refused(Reason.LOST_LEASE, 6, world.a.agent)
    assert await world.a.take_lease(JOB, 6) == Lease(messages.checkpoint(20, 6))
    assert (await world.store.push_shard(JOB, messages.shard(1))).outcome is Push.PRESENT
    assert (await world.store.push_shard(JOB, messages.shard(21))).outcome is Push.ADDED
    assert await world.a.accept_checkpoint(JOB, 6, messages.checkpoint(27, 6)) is None


@BOTH
async def test_a_binding_brings_its_checkpoint_only_where_redis_knows_less(world, messages) -> None:
    await bound(world, messages)
    await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(40))
    await world.binder.bind(JOB, world.b.agent, messages.binding(2, resume=messages.checkpoint(20)))
    assert await world.b.take_lease(JOB, 2) == Lease(messages.checkpoint(40))
    await world.binder.bind(JOB, world.a.agent, messages.binding(3, resume=messages.checkpoint(60, 2)))
    assert await world.a.take_lease(JOB, 3) == Lease(messages.checkpoint(60, 2))


async def test_agents_without_heartbeat_are_swept(world, messages) -> None:
    assert set((await world.store.fleet()).agents) == {world.a.agent, world.b.agent}
    assert await world.binder.sweep_agents() == ()
    await command(world.redis, "ZADD", world.keys.agents(), 1, world.a.agent)
    assert await world.binder.sweep_agents() == (world.a.agent,)
    assert await world.binder.sweep_agents() == ()
    assert await command(world.redis, "PTTL", world.keys.agent(world.b.agent)) in range(1, 5001)
    await world.b.leave()
    assert (await world.store.fleet()).agents == {}
