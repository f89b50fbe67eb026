"""The metrics API over real TLS: whom it lets in, and what it answers."""

from __future__ import annotations

import json
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from aiohttp import web

from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.scripts import Fencing
from coserve_operator.kube import NotFoundError, UnavailableError
from coserve_operator.metrics_api.front_proxy import Trust, read_trust, server_context
from coserve_operator.metrics_api.server import Connections, MetricsApi
from coserve_operator.redis.bounded import REPLY_BYTES
from coserve_operator.redis.store import METRICS_USER, OperatorStore
from coserve_operator.settings import MetricsApiSettings

ROOT = "/apis/custom.metrics.k8s.io/v1beta2"
METRIC = f"{ROOT}/namespaces/ml/inferenceendpoints.coserve.dev/tiny/slo_saturation_percent"


def certify(folder: Path, ca: str, name: str, subject: str) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    if not (folder / f"{ca}.crt").exists():
        made = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", f"{ca}.key", "-out", f"{ca}.crt")
        openssl("req", "-x509", *made, "-subj", f"/CN={ca}", "-addext", "keyUsage=critical,keyCertSign")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
    (folder / "ext").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\nkeyUsage=digitalSignature\n"
    )
    signed = ("-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "2", "-extfile", "ext")
    openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signed)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    certify(folder, "server-ca", "tls", "/CN=coserve-metrics-api")
    certify(folder, "proxy-ca", "proxy", "/CN=front-proxy")
    certify(folder, "proxy-ca", "stranger", "/CN=somebody")
    certify(folder, "other-ca", "forged", "/CN=front-proxy")
    return folder


class Endpoints:
    """A Kube with one endpoint, or away."""

    def __init__(self, body: Any) -> None:
        self.body, self.away = body, False

    async def get(self, _: Any, namespace: str, name: str) -> Any:
        if self.away:
            raise UnavailableError(0, "the API server is away")
        if (namespace, name) != ("ml", "tiny"):
            raise NotFoundError(404, "")
        return self.body


@pytest.fixture
async def api(certificates, redis, redis_server, make):
    """The server, and `ask(path, certificate)`; it reads Redis as the user that the operator makes for it."""
    await OperatorStore(redis, b"key", lambda: 0.0, "metrics-password").check()
    as_metrics = {
        "redis_url": redis_server.url, "redis_username": METRICS_USER, "redis_password": "metrics-password",
    }  # fmt: skip
    kube = Endpoints(make.endpoint_body())
    trust = Trust((certificates / "proxy-ca.crt").read_text(), frozenset({"front-proxy"}))
    connections = Connections(MetricsApiSettings(**as_metrics))
    application = MetricsApi(kube, connections, trust, lambda: datetime(2026, 11, 21, tzinfo=UTC)).application()
    runner = web.AppRunner(application)
    await runner.setup()
    context = server_context(trust, certificates)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    port = runner.addresses[0][1]

    class Client:
        endpoints = kube

        @staticmethod
        async def ask(path: str, certificate: str | None = "proxy") -> tuple[int, Any]:
            client = ssl.create_default_context(cafile=str(certificates / "server-ca.crt"))
            if certificate is not None:
                client.load_cert_chain(certificates / f"{certificate}.crt", certificates / f"{certificate}.key")
            url = f"https://127.0.0.1:{port}{path}"
            async with aiohttp.ClientSession() as session, session.get(url, ssl=client) as answer:
                text = await answer.text()
                return answer.status, json.loads(text) if text.startswith("{") else text

    yield Client()
    await runner.cleanup()
    await connections.aclose()


async def beat(redis, make, pod: str, saturation: float, **more: Any) -> None:
    agent = make.agent_of(pod)
    await Fencing(redis, Keys("e-1"), agent).heartbeat(make.heartbeat(pod, saturation=saturation, **more))


async def test_only_the_front_proxy_may_ask(api) -> None:
    assert (await api.ask(ROOT, "proxy"))[0] == 200
    status, answer = await api.ask(ROOT, "stranger")
    assert (status, answer["reason"]) == (403, "Forbidden")
    assert (await api.ask(METRIC, None))[0] == 403
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await api.ask(ROOT, "forged")
    assert await api.ask("/healthz", None) == (200, "ok")


async def test_discovery_names_the_metric_of_endpoints(api) -> None:
    _, answer = await api.ask(ROOT)
    assert answer["groupVersion"] == "custom.metrics.k8s.io/v1beta2"
    assert answer["resources"] == [
        {
            "name": "inferenceendpoints.coserve.dev/slo_saturation_percent", "singularName": "", "namespaced": True,
            "kind": "MetricValueList", "verbs": ["get"],
        }
    ]  # fmt: skip


async def test_the_metric_is_the_mean_over_the_ready_agents(api, redis, make) -> None:
    await beat(redis, make, "p1", 60.0)
    await beat(redis, make, "p2", 81.0)
    await beat(redis, make, "p3", 500.0, ready=False)
    await beat(redis, make, "p4", 500.0, draining=True)
    status, answer = await api.ask(METRIC)
    assert status == 200
    (item,) = answer["items"]
    assert item["value"] == "70500m"
    assert item["metric"] == {"name": "slo_saturation_percent", "selector": None}
    assert item["describedObject"]["name"] == "tiny"


async def test_what_a_tenant_writes_hides_no_agent_and_takes_no_memory(api, redis, make) -> None:
    await beat(redis, make, "p1", 60.0)
    for name in ("a:b", b"\xff", "x" * 100_000, "gone"):
        await command(redis, "ZADD", Keys("e-1").agents(), 1, name)
    status, answer = await api.ask(METRIC)
    assert (status, answer["items"][0]["value"]) == (200, "60000m")
    await command(redis, "SET", Keys("e-1").agent("gone"), b"x" * (2 * REPLY_BYTES))
    status, answer = await api.ask(METRIC)
    assert (status, answer["reason"]) == (503, "ServiceUnavailable")


async def test_no_data_is_not_zero(api, redis, make) -> None:
    status, answer = await api.ask(METRIC)
    assert (status, answer["kind"], answer["code"]) == (404, "Status", 404)
    await beat(redis, make, "p1", 10.0, ready=False)
    assert (await api.ask(METRIC))[0] == 404
    assert (await api.ask(METRIC.replace("tiny", "other")))[0] == 404
    assert (await api.ask(METRIC.replace("slo_", "other_")))[0] == 404


async def test_a_missing_api_server_is_an_error_and_no_number(api) -> None:
    api.endpoints.away = True
    status, answer = await api.ask(METRIC)
    assert (status, answer["reason"]) == (503, "ServiceUnavailable")


async def test_its_redis_user_reads_heartbeats_and_nothing_else(api, redis, redis_server) -> None:
    mine = redis_server.connect(METRICS_USER, "metrics-password")
    for words in (
        ("GET", "cs:{e-1}:agent:x"),
        ("SET", "cs:{e-1}:agent:x", "1"),
        ("MGET", "cs:{e-1}:job:j:fence"),
        ("KEYS", "*"),
    ):
        with pytest.raises(Exception, match="permission"):
            await command(mine, *words)
    await mine.aclose()


async def test_trust_is_read_from_where_the_api_server_says_it() -> None:
    class Kube:
        data: ClassVar[Any] = {"requestheader-client-ca-file": "PEM", "requestheader-allowed-names": '["front-proxy"]'}

        async def get(self, *_: Any) -> Any:
            return {"data": self.data}

    assert await read_trust(Kube()) == Trust("PEM", frozenset({"front-proxy"}))
    Kube.data = {}
    with pytest.raises(RuntimeError, match="aggregation layer"):
        await read_trust(Kube())


def test_without_allowed_names_every_name_of_the_ca_is_fine() -> None:
    certificate = {"subject": ((("commonName", "anybody"),),)}
    assert Trust("", frozenset()).admits(certificate)
    assert not Trust("", frozenset()).admits(None)
    assert not Trust("", frozenset({"front-proxy"})).admits(certificate)
