"""Whatever a tenant has written under its keys, a script compares it, and what reads it is typed code."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coserve_api.errors import MessageError
from coserve_contract import lua
from coserve_contract.connect import command
from coserve_contract.message import MESSAGE_BYTES
from coserve_contract.messages import Completed, Desired
from coserve_contract.scripts import BIND_LOOKS, Fence, Lease, Reason, Refused
from coserve_contract.store import Push, Pushed, endpoint_uids

JOB = "job-1"
RUBBISH = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"x", b"9" * 5000, b"1e999", b"nan", b"{", b"[]", b'{"version":2}', b'{"cursor":"x"}', b"\xff"]),
)
OWN_TOKEN = "redis.call('GET', KEYS[1])"


@pytest.mark.parametrize("name", [name for name in vars(lua) if name.isupper() and name != "MESSAGE_BYTES"])
def test_no_script_parses_what_it_finds(name: str) -> None:
    script = getattr(lua, name)
    assert "cjson" not in script
    assert "cmsgpack" not in script
    parsed = set(re.findall(r"tonumber\((redis\.call\([^)]*\)|\S+?)[ )]", script))
    assert {each for each in parsed if not each.startswith("ARGV[")} <= {OWN_TOKEN}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rubbish=st.dictionaries(st.sampled_from(["epoch", "agent", "checkpoint", "progress", "result", "owner"]), RUBBISH)
)
@example(rubbish={"checkpoint": b"{", "progress": b"{"})
@example(rubbish={"epoch": b"x", "agent": b"a:b"})
async def test_every_call_answers_by_its_type(world: Any, messages: Any, rubbish: dict[str, bytes]) -> None:
    await command(world.redis, "FLUSHALL")
    await world.start()
    assert await world.binder.bind(JOB, world.a.agent, messages.binding(1)) is None
    await world.a.take_lease(JOB, 1)
    for name, value in rubbish.items():
        if name in ("epoch", "agent"):
            await command(world.redis, "HSET", world.keys.fence(JOB), name, value)
        else:
            await command(world.redis, "SET", getattr(world.keys, name)(JOB), value)
    calls = [
        lambda: world.store.push_shard(JOB, messages.shard(1)),
        lambda: world.a.renew_lease(JOB, 1),
        lambda: world.a.report_progress(JOB, messages.progress(1, 1)),
        lambda: world.a.take_lease(JOB, 1),
        lambda: world.a.accept_checkpoint(JOB, 1, messages.checkpoint(3)),
        lambda: world.a.rewind(JOB, 1, messages.checkpoint(2)),
        lambda: world.binder.rebrief(JOB, world.a.agent, messages.binding(1, desired=Desired.STOP)),
        lambda: world.binder.bind(JOB, world.b.agent, messages.binding(2, resume=messages.checkpoint(5))),
        lambda: world.binder.unbind(JOB, world.b.agent, 2),
        lambda: world.a.finish(JOB, Completed(epoch=1, step=1)),
        lambda: world.store.delete_job(JOB),
    ]
    for call in calls:
        try:
            answer = await call()
        except MessageError:
            continue
        assert answer is None or isinstance(answer, Refused | Lease | Pushed)
    assert (await world.store.job(JOB)).fence is None


async def test_a_job_with_rubbish_in_its_fence_and_checkpoint_is_bound_anew(world: Any, messages: Any) -> None:
    await command(world.redis, "HSET", world.keys.fence(JOB), "epoch", "x" * 99, "agent", "a:b")
    await command(world.redis, "SET", world.keys.checkpoint(JOB), "x" * (MESSAGE_BYTES + 100))
    await command(world.redis, "SET", world.keys.result(JOB), "{")
    binding = messages.binding(1, resume=messages.checkpoint(5))
    assert await world.binder.bind(JOB, world.a.agent, binding) is None
    record = await world.store.job(JOB)
    assert (record.fence, record.checkpoint) == (Fence(1, world.a.agent), messages.checkpoint(5))


async def test_a_checkpoint_that_does_not_read_gives_no_lease_and_takes_no_shard(world: Any, messages: Any) -> None:
    """Nobody knows where to go on; from the beginning would be wrong."""
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    await command(world.redis, "SET", world.keys.checkpoint(JOB), '{"version": 2}')
    with pytest.raises(MessageError, match=r"checkpoint: field version"):
        await world.a.take_lease(JOB, 1)
    with pytest.raises(MessageError, match=r"checkpoint: field version"):
        await world.store.push_shard(JOB, messages.shard(1))
    assert await world.b.take_lease(JOB, 1) == Refused(Reason.NOT_OWNER, 1, world.a.agent)


async def test_what_changed_between_the_look_and_the_write_is_looked_at_again(world: Any, messages: Any) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    await world.a.take_lease(JOB, 1)
    look = world.a._checkpoint

    async def late(job: str) -> bytes:
        seen = await look(job)
        await command(world.redis, "SET", world.keys.checkpoint(JOB), messages.checkpoint(9).dumps())
        return bytes(seen)

    world.a._checkpoint = late
    for call in (
        lambda: world.a.accept_checkpoint(JOB, 1, messages.checkpoint(3)),
        lambda: world.a.rewind(JOB, 1, None),
        lambda: world.a.take_lease(JOB, 1),
    ):
        await command(world.redis, "DEL", world.keys.checkpoint(JOB))
        assert await call() == Refused(Reason.CHANGED, 1)
    assert (await world.store.job(JOB)).checkpoint == messages.checkpoint(9)


@pytest.mark.parametrize(("times", "is_bound"), [(1, True), (BIND_LOOKS - 1, True), (1000, False)])
async def test_a_binding_looks_again_where_the_agent_before_wrote_in_between(
    world: Any, messages: Any, monkeypatch: pytest.MonkeyPatch, times: int, is_bound: bool
) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    written = 0

    async def late(redis: Any, *words: Any) -> Any:
        nonlocal written
        found = await command(redis, *words)
        if words[:2] == ("GETRANGE", world.keys.result(JOB)) and written < times:
            written += 1
            await command(redis, "SET", world.keys.checkpoint(JOB), messages.checkpoint(written).dumps())
        return found

    monkeypatch.setattr("coserve_contract.scripts.command", late)
    refused = await world.binder.bind(JOB, world.b.agent, messages.binding(2))
    assert refused == (None if is_bound else Refused(Reason.CHANGED, 1, world.a.agent))
    record = await world.store.job(JOB)
    assert record.checkpoint == messages.checkpoint(min(times, BIND_LOOKS))
    assert record.fence == (Fence(2, world.b.agent) if is_bound else Fence(1, world.a.agent))


async def test_a_feeder_looks_again_where_a_checkpoint_came_in_between(
    world: Any, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def late(redis: Any, *words: Any) -> Any:
        answer = await command(redis, *words)
        if words[0] == "MGET" and not asked:
            await command(redis, "SET", world.keys.checkpoint(JOB), messages.checkpoint(1).dumps())
        asked.append(words[0])
        return answer

    monkeypatch.setattr("coserve_contract.store.command", late)
    assert (await world.store.push_shard(JOB, messages.shard(1))).outcome is Push.PRESENT
    assert asked == ["MGET", "MGET"]


async def test_an_endpoint_goes_whatever_stands_under_its_keys(world: Any, messages: Any) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    keys = world.keys
    for key in (keys.agents(), keys.jobs(), keys.fence(JOB)):
        await command(world.redis, "DEL", key)
    await command(world.redis, "SET", keys.agents(), "x")
    await command(world.redis, "SADD", keys.jobs(), JOB, "a:b", "c}")
    await command(world.redis, "SET", keys.fence(JOB), "x")
    for number in range(3000):
        await command(world.redis, "SET", f"{keys.prefix}{number}", "x")
    assert await world.store.delete_job(JOB) is None
    other = keys.prefix.replace("endpoint-1", "endpoint-11") + "x"
    await command(world.redis, "SET", other, "x")
    assert await world.store.delete_endpoint() is None
    assert await command(world.redis, "KEYS", "*") == [other.encode()]
    assert await endpoint_uids(world.redis) == frozenset()
