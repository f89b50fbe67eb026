"""The Redis of each tenant: its objects as a real API server takes them, what makes and removes it, and that a real
redis-server starts by its script and is found dead by its probe.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from operator_fakes import FakeKube
from pydantic import ValidationError

from coserve_contract.connect import command, connect
from coserve_operator.apply.tenant_redis import UNUSED_S, TenantRedisKeeper
from coserve_operator.kube import ENDPOINT
from coserve_operator.manifests import tenant_redis as manifests
from coserve_operator.manifests.tenant_redis import TenantRedisParts
from coserve_operator.redis.store import NoLeadership
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import PodDefaults, Settings, TenantRedis
from coserve_operator.tenants import redis_name, redis_password, redis_url
from coserve_operator.tls import RedisTls
from coserve_operator.watch.cache import Cache

SYSTEM = "coserve-system"
HOW = TenantRedis(
    image="redis:7.4",
    resources={"requests": {"memory": "128Mi"}, "limits": {"memory": "256Mi"}},
    pod=PodDefaults(priorityClassName="high", nodeSelector={"pool": "system"}),
)
ACCOUNT = {
    "apiVersion": "v1",
    "kind": "ServiceAccount",
    "metadata": {"name": "coserve-operator", "namespace": SYSTEM, "uid": "account"},
}


def parts(tenant: str = "ml", how: TenantRedis = HOW, password: str = "secret") -> TenantRedisParts:
    return TenantRedisParts(SYSTEM, tenant, how, password, "")


def container(made: Any) -> Any:
    return made["spec"]["template"]["spec"]["containers"][0]


def probe(made: Any, name: str) -> list[str]:
    words: list[str] = container(made)[name]["exec"]["command"]
    return words


def test_names_of_namespaces_are_labels_and_no_two_are_the_same() -> None:
    long = ["a" * 63, "a" * 62 + "b", "a" * 49, "a" * 48, "b" * 50]
    names = [redis_name(each) for each in [*long, "ml"]]
    assert len(set(names)) == len(names)
    assert all(len(each) <= 63 for each in names)
    assert redis_name(redis_name("a" * 63).removeprefix("coserve-redis-")) != redis_name("a" * 63)
    assert redis_url("redis://{redis}.sys.svc:6379/0", "ml") == "redis://coserve-redis-ml.sys.svc:6379/0"
    assert len({redis_password("m", "a"), redis_password("m", "b"), redis_password("n", "a")}) == 3


def test_it_is_in_memory_bounded_and_looked_at_by_a_command() -> None:
    made = manifests.deployment(parts(), ACCOUNT)
    script = container(made)["args"][0]
    assert f"maxmemory {192 << 20}\n" in script
    for line in ('save ""', "appendonly no", "maxmemory-policy noeviction", "maxclients 1000"):
        assert f"{line}\n" in script
    assert {"redis-cli ping" in probe(made, f"{name}Probe")[-1] for name in ("startup", "liveness", "readiness")} == {
        True
    }
    pod = made["spec"]["template"]["spec"]
    assert (pod["priorityClassName"], pod["nodeSelector"]) == ("high", {"pool": "system"})
    assert not any("persistentVolumeClaim" in each for each in pod["volumes"])
    with pytest.raises(ValidationError, match=r"limits\.memory is missing"):
        TenantRedis(image="redis", resources={"requests": {"memory": "1Gi"}})


def test_only_its_own_namespace_reaches_it() -> None:
    owner = {"kind": "Deployment", "metadata": {"name": "coserve-redis-ml", "uid": "d"}}
    made = {each["kind"]: each for each in manifests.beside(parts(), owner)}
    ours, theirs = made["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert "namespaceSelector" not in ours
    assert theirs["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "ml"}}
    assert theirs["podSelector"]["matchExpressions"][0]["values"] == ["coserve-agent", "coserve-feeder"]
    assert made["Secret"]["immutable"]
    assert made["Secret"]["metadata"]["name"] != parts(password="other").secret_name
    assert {each["metadata"]["ownerReferences"][0]["uid"] for each in made.values()} == {"d"}


def test_with_a_certificate_it_takes_tls_alone() -> None:
    made = manifests.deployment(parts(how=HOW.model_copy(update={"tls_secret": "certificate"})), ACCOUNT)
    assert "port 0\ntls-port 6379\n" in container(made)["args"][0]
    assert "--tls --cacert /tls/ca.crt" in probe(made, "livenessProbe")[-1]
    renewed = manifests.deployment(TenantRedisParts(SYSTEM, "ml", HOW, "secret", "other"), ACCOUNT)
    assert renewed["spec"]["template"] != manifests.deployment(parts(), ACCOUNT)["spec"]["template"]


# ---- the programs ----


@contextmanager
def started(made: Any, servers: Any, folder: Path) -> Iterator[SimpleNamespace]:
    """Run the container's own script, with a port and a folder of this machine's."""
    port = servers.free_port()
    script = container(made)["args"][0].replace("/tmp/redis.conf", f"{folder}/redis.conf")
    script = script.replace("maxclients", f"port {port}\nbind 127.0.0.1\nmaxclients").replace(
        "dir /tmp", f"dir {folder}"
    )
    words = ["env", "REDIS_PASSWORD=secret", "sh", "-c", script]
    with servers.program(words, folder / "redis.log") as process:
        servers.wait_until(lambda: servers.answers(port), process, folder / "redis.log")
        yield SimpleNamespace(port=port, process=process, url=f"redis://127.0.0.1:{port}/0")


def is_alive(made: Any, port: int) -> bool:
    """What the kubelet does."""
    words = probe(made, "livenessProbe")[-1].replace("redis-cli", f"redis-cli -p {port}")
    env = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": "secret"}
    seconds = container(made)["livenessProbe"]["timeoutSeconds"]
    try:
        return subprocess.run(["sh", "-c", words], env=env, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


async def test_the_script_starts_it_and_a_frozen_one_is_found_dead(servers: Any, tmp_path: Path) -> None:
    made = manifests.deployment(parts(), ACCOUNT)
    with started(made, servers, tmp_path) as server:
        admin = connect(server.url, None, "secret")
        flat = [each.decode() for each in await command(admin, "CONFIG", "GET", "*")]
        told = dict(zip(flat[::2], flat[1::2], strict=True))
        assert told["maxmemory"] == str(192 << 20)
        assert (told["appendonly"], told["save"], told["maxclients"]) == ("no", "", "1000")
        assert is_alive(made, server.port)
        await command(admin, "CONFIG", "SET", "busy-reply-threshold", "100")
        freezing = asyncio.create_task(admin.execute_command("EVAL", "while true do end", 0))
        for _ in range(100):
            await asyncio.sleep(0.05)
            if not is_alive(made, server.port):
                break
        assert not is_alive(made, server.port)
        assert servers.answers(server.port), "a look at the port alone finds nothing"
        freezing.cancel()
        server.process.kill()
        await admin.aclose()


# ---- the keeper ----


class Keeper:
    """The keeper, with an API server made of dictionaries."""

    def __init__(self, make: Any) -> None:
        self.make, self.cache, self.clock = make, Cache(), [0.0]
        self.kube = FakeKube(self.cache)
        settings = Settings(
            namespace=SYSTEM, redis_url="redis://{redis}:1/0", redis_password="master", tenant_redis=HOW
        )
        clock = lambda: self.clock[0]  # noqa: E731
        self.stores = Stores(settings, NoLeadership(), clock)
        self.keeper = TenantRedisKeeper(
            self.kube, settings, HOW, RedisTls(), self.cache, self.stores, clock
        )  # fmt: skip
        self.kube.put(ACCOUNT)

    def endpoint(self, namespace: str, name: str = "tiny") -> None:
        body = self.make.endpoint_body(name, f"e-{namespace}-{name}")
        body["metadata"] |= {"namespace": namespace, "resourceVersion": str(self.kube.version + 1)}
        self.kube.version += 1
        self.cache.put(ENDPOINT, body)

    def names(self, kind: str) -> list[str]:
        return sorted(name for each, name in self.kube.objects if each == kind)


async def test_each_namespace_with_endpoints_has_one_and_loses_it_some_time_after_the_last(make: Any) -> None:
    at = Keeper(make)
    for namespace, name in (("a", "one"), ("a", "two"), ("b", "one")):
        at.endpoint(namespace, name)
    await at.keeper.look()
    for kind in ("Deployment", "Service", "NetworkPolicy"):
        assert at.names(kind) == ["coserve-redis-a", "coserve-redis-b"]
    assert len(at.names("Secret")) == 2
    passwords = {
        name: body["stringData"]["password"] for (kind, name), body in at.kube.objects.items() if kind == "Secret"
    }
    assert set(passwords.values()) == {redis_password("master", "a"), redis_password("master", "b")}
    written = at.kube.version
    await at.keeper.look()
    assert at.kube.version == written, "nothing changed, and nothing is written"

    at.cache.remove(ENDPOINT, ("b", "one"))
    await at.keeper.look()
    at.clock[0] = UNUSED_S - 1
    await at.keeper.look()
    assert at.names("Deployment") == ["coserve-redis-a", "coserve-redis-b"]
    at.clock[0] = UNUSED_S
    await at.keeper.look()
    assert at.names("Deployment") == ["coserve-redis-a"]


async def test_what_is_deleted_or_changed_comes_back(make: Any) -> None:
    at = Keeper(make)
    at.endpoint("a")
    await at.keeper.look()
    (secret,) = at.names("Secret")
    at.kube.objects.pop(("Secret", secret))  # nobody tells: it is not watched
    service = at.kube.objects.pop(("Service", "coserve-redis-a"))
    at.keeper.on_event(manifests.SERVICE, "DELETED", service)
    await at.keeper.look()
    assert at.names("Secret") == [secret], "while it is not up, it may wait for it"
    assert at.names("Service") == ["coserve-redis-a"]


@pytest.mark.apiserver
def test_a_real_api_server_takes_all_of_it(api_server: Any) -> None:
    api_server.kubectl("create", "namespace", SYSTEM)
    api_server.kubectl("label", "--overwrite", "namespace", SYSTEM, "pod-security.kubernetes.io/warn=restricted")
    owner = {"kind": "Deployment", "metadata": {"name": "coserve-redis-ml", "uid": "d"}}
    how = HOW.model_copy(update={"tls_secret": "certificate"})
    for manifest in [manifests.deployment(parts(how=how), ACCOUNT), *manifests.beside(parts(), owner)]:
        words = ("apply", "--server-side", "--dry-run=server", "-f", "-")
        done = api_server.kubectl(*words, stdin=json.dumps(manifest))
        assert done.returncode == 0, done.stderr
        assert "arning" not in done.stderr
