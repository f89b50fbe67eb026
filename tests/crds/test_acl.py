"""An endpoint's Redis user does all that agents and feeders do, and sees nothing of another endpoint."""

from __future__ import annotations

import re

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from coserve_contract import lua
from coserve_contract.acl import COMMANDS, acl_deluser, acl_setuser, acl_username
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import Completed, FeedStatus, Released
from coserve_contract.scripts import Fencing, Lease
from coserve_contract.store import Push, Store

JOB = "job-1"
REFUSED = (NoPermissionError, ResponseError)


@pytest.fixture
async def tenant(redis_server, world):
    """The client of endpoint-1's user."""
    await command(world.redis, *acl_setuser("endpoint-1", "secret"))
    client = redis_server.connect(acl_username("endpoint-1"), "secret")
    yield client
    await client.aclose()
    await command(world.redis, *acl_deluser("endpoint-1"))


async def test_agents_and_feeders_can_do_all_their_work(world, messages, tenant) -> None:
    agent, store = Fencing(tenant, world.keys, world.a.agent), Store(tenant, world.keys)
    agent.register(await agent.heartbeat(messages.heartbeat(agent.agent)))
    for epoch in (1, 2):
        await world.binder.bind(JOB, agent.agent, messages.binding(epoch))
        assert set((await store.bindings(agent.agent))[0]) == {JOB}
        assert isinstance(await agent.take_lease(JOB, epoch), Lease)
        assert (await store.push_shard(JOB, messages.shard(epoch))).outcome is Push.ADDED
        assert (await store.push_eval(JOB, messages.shard(1))).outcome is Push.ADDED
        await store.set_feed(JOB, FeedStatus())
        assert len(await store.read_shards(JOB, epoch - 1)) == 1
        assert len(await store.read_eval(JOB)) == 1
        assert await agent.renew_lease(JOB, epoch) is None
        kept = messages.progress(epoch, epoch).model_copy(update={"eval_cursor": 1})
        assert await agent.report_progress(JOB, kept) is None
        assert await agent.accept_checkpoint(JOB, epoch, messages.checkpoint(epoch, epoch)) is None
        end = Released(epoch=1, step=1) if epoch == 1 else Completed(epoch=2, step=2)
        assert await agent.finish(JOB, end) is None
    assert (await store.job(JOB)).result == Completed(epoch=2, step=2)
    assert await store.adapters() == {}
    assert await store.incarnation() == "first"
    await agent.leave()


async def test_rewinding_is_allowed_too(world, messages, tenant) -> None:
    agent = Fencing(tenant, world.keys, world.a.agent)
    agent.register("first")
    await world.binder.bind(JOB, agent.agent, messages.binding(1, resume=messages.checkpoint(5)))
    assert isinstance(await agent.take_lease(JOB, 1), Lease)
    assert await agent.rewind(JOB, 1, None) is None


OTHER = Keys("endpoint-2").incarnation()


@pytest.mark.parametrize(
    "words",
    [
        ("GET", OTHER),
        ("SET", OTHER, "x"),
        ("DEL", OTHER),
        ("EVAL", "return redis.call('GET', KEYS[1])", 1, OTHER),
        ("EVAL", f"return redis.call('GET', '{OTHER}')", 0),
        ("EVAL", "return redis.call('KEYS', '*')", 0),
        ("EVAL", "return redis.call('SCAN', '0')", 0),
        ("GET", "cs:endpoints"),
        ("GET", Keys("endpoint-1").prefix.replace("{", "").replace("}", "") + "incarnation"),
        ("SCAN", 0),
        ("KEYS", "*"),
        ("RANDOMKEY",),
        ("DBSIZE",),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "WHOAMI"),
        ("ACL", "SETUSER", "me", "on", "nopass", "allkeys", "allcommands"),
        ("CLIENT", "LIST"),
        ("INFO",),
        ("SELECT", 1),
        ("SUBSCRIBE", "x"),
        ("MONITOR",),
        ("SCRIPT", "FLUSH"),
        ("FUNCTION", "LIST"),
        ("SHUTDOWN",),
        ("RESTORE", Keys("endpoint-1").feed(JOB), 0, "x"),
    ],
    ids=lambda words: " ".join(str(word) for word in words[:2])[:40],
)
async def test_nothing_of_another_endpoint_and_nothing_administrative(redis, tenant, words) -> None:
    await command(redis, "SET", OTHER, "secret of another")
    with pytest.raises(REFUSED, match=r"(?i)permission|can't access|can't run"):
        await command(tenant, *words)
    assert await command(redis, "GET", OTHER) == b"secret of another"


async def test_the_password_is_not_stored_and_another_is_refused(redis_server, redis, tenant) -> None:
    assert "secret" not in str(acl_setuser("endpoint-1", "secret"))
    stranger = redis_server.connect(acl_username("endpoint-1"), "guess")
    with pytest.raises(AuthenticationError):
        await command(stranger, "PING")
    await stranger.aclose()


async def test_asserting_a_user_again_changes_nothing_and_takes_nothing_away(redis, tenant) -> None:
    await command(redis, "ACL", "SETUSER", acl_username("endpoint-1"), "+@all", "~*")
    before = await command(tenant, "PING")
    await command(redis, *acl_setuser("endpoint-1", "secret"))
    assert await command(tenant, "PING") == before
    with pytest.raises(NoPermissionError):
        await command(tenant, "GET", OTHER)


def test_every_command_of_the_agents_scripts_is_allowed() -> None:
    texts = [text for name, text in vars(lua).items() if name.isupper() and isinstance(text, str)]
    scripts = "".join(text for text in texts if "stale_token" not in text)
    called = {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", scripts)}
    assert called <= set(COMMANDS)
    assert set(COMMANDS) - called == {"ping", "client|setname", "eval", "evalsha", "hgetall"}
