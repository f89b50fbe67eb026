"""How agents and feeders reach Redis: users and passwords that change while pods run, Redis without users of its own,
certificates, and faults by which a Redis is known.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from live_operator import Cluster, Operator, eventually
from operator_fakes import FakeKube, FakeStore
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from coserve_contract.acl import acl_username
from coserve_contract.connect import command, connect
from coserve_operator.apply.budget import StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import LOOK_S, Applier
from coserve_operator.controller import Controller
from coserve_operator.decide.actions import FeederAction
from coserve_operator.decide.observed import FeederView
from coserve_operator.manifests import endpoint as owned
from coserve_operator.manifests.metadata import secret_name
from coserve_operator.metrics_api.server import Connections
from coserve_operator.redis.store import NoLeadership, OperatorStore, StoreError
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import MetricsApiSettings, Settings
from coserve_operator.tenants import RedisAccess
from coserve_operator.tls import RedisTls, read_tls
from coserve_operator.watch.cache import Cache

UID = "e-1"


class Leads(NoLeadership):
    """One operator after another."""

    def __init__(self, token: int = 1) -> None:
        self._token = token

    def token(self) -> int:
        return self._token


async def logs_in(redis_server: Any, username: str, password: str) -> bool:
    client = redis_server.connect(username, password)
    try:
        return bool(await command(client, "PING"))
    except AuthenticationError:
        return False
    finally:
        await client.aclose()


# ---- rotation ----


async def test_until_the_key_before_is_taken_away_both_passwords_do(redis: Redis, redis_server: Any) -> None:
    before = OperatorStore(redis, b"old", lambda: 0.0, "", Leads())
    old = before.credentials(UID)
    await before.assert_user(UID)
    during = OperatorStore(redis, b"new", lambda: 0.0, "", Leads(2), b"old")
    await during.assert_user(UID)
    new = during.credentials(UID)
    assert new != old
    assert [await logs_in(redis_server, *each) for each in (old, new)] == [True, True]
    await OperatorStore(redis, b"new", lambda: 0.0, "", Leads(3)).assert_user(UID)
    assert [await logs_in(redis_server, *each) for each in (old, new)] == [False, True]


def stores(tls: RedisTls | None = None, **settings: Any) -> Stores:
    made = {"redis_url": "redis://{redis}.sys.svc:6379/0", "endpoint_key": "key", "redis_password": "master"}
    return Stores(Settings(**made | settings), NoLeadership(), lambda: 0.0, tls or RedisTls())


def test_another_secret_for_whatever_changes_and_no_other(make: Any) -> None:
    accesses = [
        stores().access("ml", UID),
        stores(endpoint_key="other").access("ml", UID),
        stores(redis_url="redis://{redis}.elsewhere.svc:6379/0").access("ml", UID),
        stores(RedisTls("PEM", "digest")).access("ml", UID),
        stores().access("other", UID),
    ]
    assert len({secret_name("tiny", each) for each in accesses}) == len(accesses)
    same = stores(RedisTls("", "renewed"), endpoint_key_previous="before").access("ml", UID)
    assert same == accesses[0]
    assert len({stores().reference(), stores(endpoint_key="other").reference()}) == 2
    secret = owned.redis_secret(make.endpoint(), accesses[3])
    assert secret["immutable"] is True
    assert secret["stringData"] == {
        "username": acl_username(UID), "password": accesses[3].password, "ca.crt": "PEM",
    }  # fmt: skip


def test_each_namespace_has_a_store_of_its_own_and_external_one_has_all() -> None:
    made = stores()
    assert made.of("a") is made.of("a") is not made.of("b")
    assert made.access("a", UID).url == "redis://coserve-redis-a.sys.svc:6379/0"
    shared = stores(redis_url="redis://r:6379/0", agent_redis_url="rediss://outside:6380/0")
    assert shared.of("a") is shared.of("b")
    assert shared.access("a", UID).url == "rediss://outside:6380/0"


class Pass:
    """Passes over one endpoint, with a cluster made of dictionaries."""

    def __init__(self, make: Any) -> None:
        self.cache, self.clock = Cache(), [0.0]
        self.kube, self.store = FakeKube(self.cache), FakeStore(make)
        clock = lambda: self.clock[0]  # noqa: E731
        slot = MetricsSlotKeeper(self.kube, None, clock, lambda: None)
        parts = Applier(self.kube, clock), StatusBudget(clock), Recorder(self.kube, "test"), slot
        self.controller = Controller(Settings(), self.kube, self.store, self.cache, *parts, lambda: make.NOW)
        self.kube.put(make.endpoint_body())

    async def go(self) -> None:
        await self.controller.reconcile(("ml", "tiny"))

    def secrets(self) -> list[str]:
        return sorted(name for kind, name in self.kube.objects if kind == "Secret")


async def test_a_secret_that_was_deleted_comes_back(make: Any) -> None:
    at = Pass(make)
    await at.go()
    (name,) = at.secrets()
    env = at.kube.objects["Deployment", "tiny"]["spec"]["template"]["spec"]["containers"][0]["env"]
    named = {each["valueFrom"]["secretKeyRef"]["name"] for each in env if "secretKeyRef" in each.get("valueFrom", {})}
    assert named == {name}
    at.kube.objects.pop(("Secret", name))
    await at.go()
    assert at.secrets() == [], "mere passes do not ask"
    at.clock[0] = LOOK_S
    await at.go()
    assert at.secrets() == [name]
    at.kube.objects.pop(("Secret", name))
    waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{name}" not found'}
    at.kube.put({
        "kind": "Pod",
        "metadata": {
            "name": "p1", "namespace": "ml", "uid": "p",
            "labels": {"app.kubernetes.io/name": "coserve-agent", "coserve.dev/endpoint": "tiny"},
        },
        "spec": {}, "status": {"containerStatuses": [{"name": "agent", "state": {"waiting": waiting}}]},
    })  # fmt: skip
    await at.go()
    assert at.secrets() == [name], "a pod waits for it"


def test_a_feeder_with_another_user_or_another_redis_is_made_anew(it: Any) -> None:
    it.bound()
    it.feeder = FeederView("f", "inputs", active=True, secret="")
    assert it.judge().feeder is FeederAction.RUN
    it.feeder = FeederView("f", "inputs", active=True, secret="tiny-redis-before")
    assert it.judge().feeder is FeederAction.RENEW
    it.redis_up = False
    assert it.judge().feeder is FeederAction.KEEP, "not while nothing can be known"


@pytest.mark.apiserver
async def test_rotation_step_by_step(served: Any, cluster: Cluster, operator: Operator, redis_server: Any) -> None:
    def named() -> str:
        env = cluster.get("deployment", "tiny")["spec"]["template"]["spec"]["containers"][0]["env"]  # type: ignore[index]
        return next(each["valueFrom"]["secretKeyRef"]["name"] for each in env if each["name"].endswith("PASSWORD"))

    old = cluster.redis_secret("tiny")
    assert old is not None
    await eventually(lambda: named() == old["name"])
    for previous, old_one_works in (("a key", True), ("", False)):
        operator.processes[-1].terminate()
        operator.processes[-1].wait(20)
        operator.env |= {"COSERVE_ENDPOINT_KEY": "another key", "COSERVE_ENDPOINT_KEY_PREVIOUS": previous}
        operator.start()

        async def both(works: bool = old_one_works) -> bool:
            new = cluster.redis_secret("tiny")
            if new is None or new["name"] == old["name"] or named() != new["name"]:
                return False
            logins = [await logs_in(redis_server, each["username"], each["password"]) for each in (old, new)]
            return logins == [works, True]

        await eventually(both)


# ---- Redis without users of its own ----


@pytest.fixture
async def without_acl(redis: Redis, redis_server: Any) -> AsyncIterator[Redis]:
    rules = ("reset", "on", ">given", "~*", "&*", "+@all", "-acl")
    await command(redis, "ACL", "SETUSER", "given", *rules)
    client = redis_server.connect("given", "given")
    yield client
    await client.aclose()
    await command(redis, "ACL", "DELUSER", "given")


async def test_where_users_cannot_be_made_all_have_the_given_one(without_acl: Redis) -> None:
    refused = OperatorStore(without_acl, b"key", lambda: 0.0, "", Leads())
    with pytest.raises(StoreError, match=r"set redis\.external\.endpointUsers to Shared") as error:
        await refused.assert_user(UID)
    assert error.value.reason == "AccessDenied"
    shared = OperatorStore(without_acl, b"key", lambda: 0.0, "metrics", Leads(2), shared_user=("given", "given"))
    assert await shared.check()
    await shared.assert_user(UID)
    await shared.begin(UID)
    assert (await shared.read({UID: []}))[UID].incarnation  # type: ignore[union-attr]
    assert shared.credentials(UID) == ("given", "given")
    await shared.delete_endpoint(UID)
    assert await shared.endpoints() == frozenset()


def test_with_a_shared_user_pods_have_the_operators() -> None:
    made = stores(redis_url="redis://r:1/0", redis_username="given", redis_password="secret", shared_user=True)
    assert made.access("ml", UID).username == "given"
    assert made.access("ml", UID).password == "secret"


# ---- faults ----


class Server:
    """A redis-server that a test may spoil."""

    def __init__(self, servers: Any, folder: Path, **settings: str) -> None:
        self.socket = folder / "redis.sock"
        given = {"port": "0", "unixsocket": str(self.socket), "save": "", "busy-reply-threshold": "50"} | settings
        self.words = ["redis-server", *(part for key, value in given.items() for part in (f"--{key}", value))]
        self.url = f"unix://{self.socket}"


async def counted(client: Redis, connections: int) -> None:
    """Wait until the server has accepted so many."""
    async with asyncio.timeout(10):
        while int((await command(client, "INFO", "clients"))["connected_clients"]) < connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", ["Busy", "OutOfMemory", "TooManyConnections"])
async def test_a_redis_in_trouble_is_not_asked_until_it_is_well(fault: str, servers: Any, tmp_path: Path) -> None:
    at = Server(servers, tmp_path, maxmemory="8mb", maxclients="10")
    with servers.program(at.words, tmp_path / "log") as process:
        servers.wait_until(at.socket.exists, process, tmp_path / "log")
        client, tenant = connect(at.url), connect(at.url)
        now = [0.0]
        store = OperatorStore(client, b"key", lambda: now[0], "", Leads())
        assert await store.check()
        others: list[Any] = []
        if fault == "Busy":
            others.append(asyncio.ensure_future(tenant.execute_command("EVAL", "while true do end", 0)))
            await asyncio.sleep(0.3)
        elif fault == "OutOfMemory":
            with pytest.raises(RedisError):
                for number in range(100):
                    await command(tenant, "SET", f"k{number}", b"x" * (1 << 18))
        else:
            others = [await asyncio.open_unix_connection(str(at.socket)) for _ in range(9)]
            await counted(client, 10)
        with pytest.raises(StoreError) as error:
            await store.check()
        assert error.value.reason == fault
        assert store.trouble is not None
        asked = client.connection_pool
        await asked.disconnect()
        for ask in (store.assert_user(UID), store.endpoints(), store.read({UID: []})):
            with pytest.raises(StoreError) as error:  # at once, by what is known
                await ask
            assert error.value.reason == fault
        if fault == "Busy":
            await command(client, "SCRIPT", "KILL")
            with pytest.raises(RedisError):
                await others[0]
        elif fault == "OutOfMemory":
            await command(tenant, "FLUSHALL")
        else:
            for _, writer in others:
                writer.close()
                await writer.wait_closed()
            await asyncio.sleep(0.1)
        now[0] = 60.0
        assert await store.check(), "what was missing meanwhile proves nothing: all is looked at anew"
        assert store.trouble is None
        await store.assert_user(UID)
        view = (await store.read({UID: []}))[UID]
        assert not view.settled  # type: ignore[union-attr]
        await client.aclose()
        await tenant.aclose()


# ---- certificates ----


async def test_a_redis_is_known_by_its_name_and_the_given_ca(servers: Any, tmp_path: Path) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    (tmp_path / "ext").write_text("subjectAltName=DNS:localhost\n")
    for words in (
        ("req", "-x509", *key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt"),
        ("req", *key, "-subj", "/CN=redis", "-keyout", "tls.key", "-out", "csr"),
        ("x509", "-req", "-in", "csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-extfile", "ext", "-out", "tls.crt"),
    ):
        await asyncio.to_thread(subprocess.run, ["openssl", *words], check=True, capture_output=True, cwd=tmp_path)
    tls, port = read_tls(tmp_path), servers.free_port()
    files = {"tls-cert-file": "tls.crt", "tls-key-file": "tls.key", "tls-ca-cert-file": "ca.crt"}
    given = {"port": "0", "tls-port": str(port), "bind": "127.0.0.1", "tls-auth-clients": "no", **files}
    words = ["redis-server", *(part for name, value in given.items() for part in (f"--{name}", value))]
    with servers.program(words, tmp_path / "log") as process:
        servers.wait_until(lambda: servers.answers(port), process, tmp_path / "log")
        settings = {"redis_url": f"rediss://localhost:{port}/0"}
        store = stores(tls, **settings, redis_password=None).of("ml")
        assert await store.check()
        connections = Connections(MetricsApiSettings(**settings), tls)
        assert await command(connections.of("ml"), "PING")
        for url, ca in ((f"rediss://127.0.0.1:{port}/0", tls.ca), (f"rediss://localhost:{port}/0", "")):
            client = connect(url, ca=ca)
            with pytest.raises((RedisConnectionError, OSError)):
                await command(client, "PING")
            await client.aclose()
        await connections.aclose()
        await store.redis.aclose()
    (tmp_path / "tls.crt").write_text("renewed")
    assert read_tls(tmp_path) != tls


async def test_the_metrics_api_asks_the_redis_of_the_namespace() -> None:
    connections = Connections(MetricsApiSettings(redis_url="redis://{redis}.sys.svc:6379/0"))
    hosts = [connections.of(each).connection_pool.connection_kwargs["host"] for each in ("a", "b", "a")]
    assert hosts == ["coserve-redis-a.sys.svc", "coserve-redis-b.sys.svc", "coserve-redis-a.sys.svc"]
    assert connections.of("a") is connections.of("a")
    await connections.aclose()


def test_an_access_says_its_ca_only_where_there_is_one(make: Any) -> None:
    plain = owned.redis_secret(make.endpoint(), RedisAccess("redis://r", "u", "p"))
    assert "ca.crt" not in plain["stringData"]
