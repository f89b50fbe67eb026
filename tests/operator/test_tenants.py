"""Two tenants, each with a real Redis of its own: whatever the one does to it, the other's jobs are bound and run."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live_operator import Agent, Cluster, Operator, bound, eventually, feed
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coserve_contract.connect import command, connect
from coserve_contract.keys import Keys
from coserve_contract.store import Store
from coserve_operator.tenants import redis_name, redis_password

pytestmark = pytest.mark.apiserver
MASTER = "master"
MOST_CLIENTS = 30


class Tenant:
    """A namespace with an endpoint, its Redis, and agents."""

    def __init__(self, cluster: Cluster, folder: Path, servers: Any) -> None:
        self.cluster, self.folder, self.servers = cluster, folder, servers
        self.socket = folder / f"{redis_name(cluster.namespace)}.sock"
        self.agents: list[Agent] = []
        self.clients: list[Redis] = []
        self.held: list[asyncio.StreamWriter] = []
        self.endpoint_uid = ""
        self._running = contextlib.ExitStack()

    def start_redis(self) -> None:
        """As the operator's manifest does, with less of everything."""
        given = {
            "port": "0", "unixsocket": str(self.socket), "save": "", "maxmemory": "16mb", "busy-reply-threshold": "100",
            "maxclients": str(MOST_CLIENTS), "requirepass": redis_password(MASTER, self.cluster.namespace),
        }  # fmt: skip
        words = ["redis-server", *(part for key, value in given.items() for part in (f"--{key}", value))]
        log = self.folder / f"{self.cluster.namespace}.log"
        self.process = self._running.enter_context(self.servers.program(words, log))
        self.servers.wait_until(self.socket.exists, self.process, log)

    def kill_redis(self) -> None:
        """What a kubelet does to one that its probe finds dead."""
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    async def serve(self, make: Any) -> None:
        """Apply an endpoint and play an agent of it."""
        self.cluster.apply(make.endpoint_body(), replicas=1)
        self.endpoint_uid = (self.cluster.get("iep", "tiny") or {})["metadata"]["uid"]
        secret = await eventually(lambda: self.cluster.redis_secret("tiny"))
        self.client = connect(f"unix://{self.socket}", secret["username"], secret["password"])
        self.clients.append(self.client)
        self.store = Store(self.client, Keys(self.endpoint_uid))

        async def registered() -> Any:
            with contextlib.suppress(RedisError, OSError):
                return await self.store.incarnation()

        await eventually(registered)
        self.agents.append(Agent(self.client, self.endpoint_uid, "p1"))

    def redis_ready(self) -> tuple[str, str]:
        found = self.cluster.condition("iep", "tiny", "RedisReady")
        return found["status"], found["reason"]

    async def end(self) -> None:
        for agent in self.agents:
            await agent.stop()
        for client in self.clients:
            await client.aclose()
        for writer in self.held:
            writer.close()
        self._running.close()


@pytest.fixture
async def tenants(crds: Any, cluster: Cluster, servers: Any, make: Any) -> AsyncIterator[Any]:
    """Tenants a and b, and the operator that serves both."""
    other = Cluster(crds, f"{cluster.namespace}-b")
    assert crds.kubectl("create", "namespace", other.namespace).returncode == 0
    with tempfile.TemporaryDirectory(prefix="coserve") as name:  # a socket's path has to be short
        folder = Path(name)
        a, b = Tenant(cluster, folder, servers), Tenant(other, folder, servers)
        for each in (a, b):
            each.start_redis()
        operator = Operator(folder, cluster, SimpleNamespace(url=f"unix://{folder}/{{redis}}.sock", password=MASTER))
        operator.start()
        try:
            for each in (a, b):
                await each.serve(make)
                await eventually(lambda each=each: each.redis_ready() == ("True", "Readable"))
            yield SimpleNamespace(a=a, b=b, operator=operator)
        finally:
            await a.end()
            await b.end()
            operator.end()
            log = operator.log(1)
            print(log)
            other.kubectl("delete", "ftj,iep", "--all", "--wait=false")
    assert "a fault of the operator" not in log


async def freeze(tenant: Tenant) -> None:
    """An endless script, as the endpoint's own user may run one."""
    words = ("EVAL", "redis.call('SET', KEYS[1], 1) while true do end", 1, f"{Keys(tenant.endpoint_uid).prefix}x")
    with contextlib.suppress(RedisError, OSError, TimeoutError):
        await command(tenant.client, *words)


async def fill(tenant: Tenant) -> None:
    with pytest.raises(RedisError):
        for number in range(1000):
            await command(tenant.client, "SET", f"{Keys(tenant.endpoint_uid).prefix}{number}", b"x" * (1 << 18))


async def exhaust(tenant: Tenant) -> None:
    async def take() -> bool:
        reader, writer = await asyncio.open_unix_connection(str(tenant.socket))
        tenant.held.append(writer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                return bool(await reader.read(1))  # refused: nobody else is greeted
        return False

    while not await take():
        pass


Fault = Callable[[Tenant], Awaitable[None]]


@pytest.mark.parametrize(
    ("spoil", "reason"), [(freeze, "Busy"), (fill, "OutOfMemory"), (exhaust, "TooManyConnections")]
)
async def test_what_one_does_to_its_redis_is_not_felt_by_the_other(
    tenants: Any, make: Any, spoil: Fault, reason: str
) -> None:
    a, b = tenants.a, tenants.b
    before = a.cluster.get("deployment", "tiny")
    await spoil(a)
    await eventually(lambda: a.redis_ready() == ("False", reason))

    b.cluster.apply(make.job_body())
    await feed(b, b.cluster)
    assert await bound(b.cluster, "job-1", 1) == "p1"
    job = b.cluster.get("ftj", "job-1")["metadata"]["uid"]
    agent = b.agents[0]
    await agent.run(job, 1)
    await eventually(lambda: b.cluster.status("ftj", "job-1").get("state") == "Running")
    assert await agent.fencing.renew_lease(job, 1) is None
    assert b.redis_ready() == ("True", "Readable")
    assert a.redis_ready() == ("False", reason)
    assert a.cluster.get("deployment", "tiny")["spec"] == before["spec"], "it serves on as it is"

    a.cluster.apply(make.job_body())
    await eventually(lambda: a.cluster.status("ftj", "job-1").get("reason") == "RedisUnavailable")
    a.kill_redis()
    a.start_redis()
    await eventually(lambda: a.redis_ready() == ("True", "Readable"))
    await feed(a, a.cluster)
    assert await bound(a.cluster, "job-1", 1) == "p1"
