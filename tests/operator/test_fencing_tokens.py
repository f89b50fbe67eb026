"""What an operator that leads no more still sends, Redis refuses; whatever was lost meanwhile: Lease, Redis, both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from leases import Access, LeaseServer
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from coserve_contract.acl import acl_username
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import AdapterRecord, Desired
from coserve_contract.store import JobRecord, Store
from coserve_operator import leader as module
from coserve_operator.decide.actions import Bind, Forget, RedisAction, Unbind, UpdateBinding
from coserve_operator.decide.binding import binding_of
from coserve_operator.leader import Leader, LeadershipLostError, NotLeadingError
from coserve_operator.redis.store import OperatorStore

UID, JOB, AGENT = "e-1", "j-1", "uid-p1.b1"
KEYS = Keys(UID)
SHA = "0123456789abcdef" * 4
RECORD = AdapterRecord(name="a", number=1, path="p", sha256=SHA, job_uid=JOB, rank=8)


@dataclass
class Replica:
    """An operator's hands: its leadership, and what it does in Redis."""

    leader: Leader
    access: Access
    store: OperatorStore


@pytest.fixture
async def lead(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A new leader, which takes the Lease away from whoever has it: that one is cut off, and believes on."""
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    server, replicas = LeaseServer(), list[Replica]()

    async def made() -> Replica:
        for each in replicas:
            each.access.away = True
        if server.lease is not None:
            server.lease["spec"] |= {"holderIdentity": "", "renewTime": "x"}
        access = Access(server)
        leader = Leader(access, "ns", "l", f"replica-{len(replicas)}")  # type: ignore[arg-type]
        await leader.acquire()
        replicas.append(Replica(leader, access, OperatorStore(redis, b"key", lambda: 0.0, "", leader)))
        await replicas[-1].store.assert_user(UID)
        return replicas[-1]

    made.server = server  # type: ignore[attr-defined]
    yield made


async def token(redis: Redis) -> int:
    return int(await command(redis, "GET", KEYS.token()) or 0)


def binding(make: Any, epoch: int, desired: Desired = Desired.RUN) -> Any:
    return binding_of(make.job(), make.endpoint(), epoch, desired, 1, 0, JobRecord())


def actions(make: Any) -> dict[str, RedisAction]:
    """On a job that is bound under epoch 1."""
    return {
        "forget": Forget(JOB),
        "bind": Bind(JOB, AGENT, binding(make, 2)),
        "rebrief": UpdateBinding(JOB, AGENT, binding(make, 1, Desired.STOP)),
        "unbind": Unbind(JOB, AGENT, 1),
    }


Write = Callable[[OperatorStore, Any], Awaitable[Any]]
WRITES: dict[str, Write] = {
    name: lambda store, make, name=name: store.do(UID, actions(make)[name])  # type: ignore[misc]
    for name in ("bind", "forget", "rebrief", "unbind")
} | {
    "register": lambda store, _: store.register(UID, ["j-9"]),
    "sweep": lambda store, _: store.sweep_agents(UID),
    "set_adapters": lambda store, _: store.set_adapters(UID, []),
    "begin": lambda store, _: store.begin(UID),
    "delete_endpoint": lambda store, _: store.delete_endpoint(UID),
}


async def everything(redis: Redis) -> dict[bytes, Any]:
    keys = sorted(await command(redis, "KEYS", "*"))
    return {key: await command(redis, "DUMP", key) for key in keys}


@pytest.mark.parametrize("name", WRITES)
async def test_an_old_leader_is_refused_after_a_new_one_took_over(
    lead: Any, redis: Redis, make: Any, name: str
) -> None:
    old = await lead()
    assert await old.store.do(UID, Bind(JOB, AGENT, binding(make, 1))) is None
    await old.store.set_adapters(UID, [RECORD])
    await old.store.begin(UID)
    await command(redis, "ZADD", KEYS.agents(), 1, "uid-p2.b1")
    await lead()
    before = await everything(redis)
    old.leader._until = asyncio.get_running_loop().time() + 0.2  # so long it goes on believing
    with pytest.raises(NotLeadingError):
        await WRITES[name](old.store, make)
    assert await everything(redis) == before
    assert acl_username(UID).encode() in await command(redis, "ACL", "USERS")


@pytest.mark.parametrize("name", WRITES)
async def test_the_new_one_may(lead: Any, redis: Redis, make: Any, name: str) -> None:
    """The negative control: without a new leader the same call changes Redis."""
    store = (await lead()).store
    await store.do(UID, Bind(JOB, AGENT, binding(make, 1)))
    await store.set_adapters(UID, [RECORD])
    await command(redis, "ZADD", KEYS.agents(), 1, "uid-p2.b1")
    before = await everything(redis)
    await WRITES[name](store, make)
    assert await everything(redis) != before


async def test_a_deleted_lease_makes_no_token_smaller(lead: Any, redis: Redis) -> None:
    for expected in (1, 2, 3):
        await lead()
        assert await token(redis) == expected
    lead.server.lease = {"metadata": {"uid": "new", "resourceVersion": "0"}, "spec": {}}
    new = await lead()
    assert new.leader.token() == lead.server.token == await token(redis) == 4
    assert [each for _, each in lead.server.log][-2:] == [1, 4]


async def test_an_equal_token_of_another_leader_is_not_ours(lead: Any, redis: Redis) -> None:
    await lead()
    lead.server.lease = {"metadata": {"uid": "new", "resourceVersion": "0"}, "spec": {}}
    assert (await lead()).leader.token() == 2


async def test_the_lease_has_a_token_before_redis_has_it(lead: Any, redis: Redis) -> None:
    await command(redis, "SET", KEYS.token(), 41)
    replace, seen = LeaseServer.replace, []

    async def looked_at(self: LeaseServer, body: Any) -> Any:
        seen.append(await token(redis))
        return await replace(self, body)

    lead.server.replace = looked_at.__get__(lead.server)
    assert (await lead()).leader.token() == lead.server.token == 42
    assert seen == [41, 41]


async def test_an_emptied_redis_refuses_the_old_leader_once_the_new_one_has_written(
    lead: Any, redis: Redis, make: Any
) -> None:
    old, new = await lead(), await lead()
    await command(redis, "FLUSHALL")
    await new.store.register(UID, [JOB])
    old.leader._until = asyncio.get_running_loop().time() + 0.2
    with pytest.raises(NotLeadingError):
        await old.store.do(UID, Forget(JOB))
    assert await Store(redis, KEYS).job_uids() == {JOB}


async def test_lease_deleted_and_redis_emptied(lead: Any, redis: Redis) -> None:
    """The new leader begins at 1; what the old one has written meanwhile makes the new one leap."""
    for _ in range(5):
        old = await lead()
    await command(redis, "FLUSHALL")
    lead.server.lease = {"metadata": {"uid": "new", "resourceVersion": "0"}, "spec": {}}
    new = await lead()
    assert (old.leader.token(), new.leader.token()) == (5, 1)
    await old.store.register(UID, ["j-old"])
    await new.store.register(UID, ["j-new"])
    assert new.leader.token() == lead.server.token == await token(redis) == 6
    old.leader._until = asyncio.get_running_loop().time() + 0.2
    with pytest.raises(NotLeadingError):
        await old.store.register(UID, ["j-late"])
    assert await Store(redis, KEYS).job_uids() == {"j-old", "j-new"}


async def test_an_old_leader_that_reaches_the_lease_ends(lead: Any, redis: Redis) -> None:
    old = await lead()
    await lead()
    old.access.away = False
    with pytest.raises(NotLeadingError, match="replica-1 holds the Lease now"):
        await old.store.register(UID, [JOB])
    with pytest.raises(NotLeadingError):
        old.leader.token()
    with pytest.raises(LeadershipLostError, match="replica-1 holds"):
        await old.leader.hold()


async def test_the_endpoints_user_cannot_name_the_token(lead: Any, redis: Redis, redis_server: Any) -> None:
    store = (await lead()).store
    tenant = redis_server.connect(*store.credentials(UID))
    try:
        assert await command(tenant, "SET", KEYS.feed(JOB), "x")
        with pytest.raises(NoPermissionError):
            await command(tenant, "SET", KEYS.token(), 1 << 60)
    finally:
        await tenant.aclose()
