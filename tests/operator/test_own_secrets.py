"""What the operator makes in its own namespace: keys that are made once, and a certificate that does not run out."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import pytest

from coserve_operator.apply import own_secrets
from coserve_operator.apply.own_secrets import AccessError, ServingCertificate, lasts, make_certificate, with_access
from coserve_operator.kube import ConflictError, Kind, Manifest, NotFoundError
from coserve_operator.metrics_api.front_proxy import Trust, load_certificate, server_context
from coserve_operator.settings import Settings

HOST = "coserve-metrics-api.coserve-system.svc"


class Secrets:
    """An API server with Secrets, which keeps what was asked of it."""

    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {}

    async def get(self, _: Kind, __: str, name: str) -> Manifest:
        if name not in self.objects:
            raise NotFoundError(404, name)
        return self.objects[name]

    async def create(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if name in self.objects:
            raise ConflictError(409, name)
        self.objects[name] = manifest
        return manifest

    async def merge(self, _: Kind, __: str, name: str, patch: Manifest) -> None:
        self.objects[name] = {**self.objects[name], "data": self.objects[name]["data"] | patch["data"]}

    def files(self, name: str) -> dict[str, str]:
        return {key: b64decode(value).decode() for key, value in self.objects[name]["data"].items()}


async def test_two_replicas_that_start_at_once_have_the_same_keys() -> None:
    kube: Any = Secrets()
    settings = Settings(access_secret="coserve-access")
    one, other = await asyncio.gather(with_access(settings, kube), with_access(settings, kube))
    assert one == other
    assert len(one.endpoint_key.get_secret_value()) == 40
    assert len({one.endpoint_key, one.metrics_password, one.redis_password}) == 3
    assert await with_access(settings, kube) == one, "a restart"


async def test_keys_of_an_earlier_chart_are_taken_and_a_given_password_is_not_replaced() -> None:
    kube: Any = Secrets()
    data = {key: b64encode(key.encode()).decode() for key in ("endpoint-key", "metrics-password", "redis-password")}
    kube.objects["coserve-access"] = {"metadata": {"name": "coserve-access"}, "data": data}
    got = await with_access(Settings(access_secret="coserve-access"), kube)
    assert got.endpoint_key.get_secret_value() == "endpoint-key"
    assert got.password == "redis-password"
    got = await with_access(Settings(access_secret="coserve-access", redis_password="external"), kube)
    assert got.password == "external"
    del data["endpoint-key"]
    with pytest.raises(AccessError, match="has no key endpoint-key"):
        await with_access(Settings(access_secret="coserve-access"), kube)


async def test_without_a_secret_nothing_is_asked() -> None:
    nobody: Any = None
    assert await with_access(Settings(endpoint_key="k"), nobody) == Settings(endpoint_key="k")


async def handshake(files: dict[str, str], folder: Path, host: str = HOST) -> Any:
    """The certificate that a server with these files shows to somebody who trusts its CA."""
    for name, text in files.items():
        (folder / name).write_text(text)
    server = server_context(Trust(files["ca.crt"], frozenset()), folder)
    load_certificate(server, folder)
    listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=server)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        trust = ssl.create_default_context(cadata=files["ca.crt"])
        trust.verify_flags |= ssl.VERIFY_X509_STRICT
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=host)
        shown = writer.get_extra_info("peercert")
        writer.close()
        return shown


async def test_the_certificate_is_that_of_the_service_and_comes_back_when_it_is_deleted(tmp_path: Path) -> None:
    kube: Any = Secrets()
    made = ServingCertificate(kube, "coserve-system", "cert", HOST)
    await made.ensure()
    first = kube.files("cert")
    assert (await handshake(first, tmp_path))["subjectAltName"] == (("DNS", HOST),)
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(first, tmp_path, "other.coserve-system.svc")
    await made.ensure()
    assert kube.files("cert") == first, "it lasts"
    del kube.objects["cert"]
    await made.ensure()
    assert kube.files("cert")["tls.crt"] != first["tls.crt"]


async def test_a_certificate_is_renewed_by_the_same_ca_before_it_ends(tmp_path: Path, monkeypatch: Any) -> None:
    kube: Any = Secrets()
    monkeypatch.setattr(own_secrets, "DAYS", 100)  # less than RENEW_DAYS
    made = ServingCertificate(kube, "coserve-system", "cert", HOST)
    await made.ensure()
    old = kube.files("cert")
    monkeypatch.undo()
    await made.ensure()
    new = kube.files("cert")
    assert new["ca.crt"] == old["ca.crt"]
    assert await lasts(new["tls.crt"], 364)
    assert not await lasts(old["tls.crt"], 364)
    await handshake({**new, "ca.crt": old["ca.crt"]}, tmp_path)


async def test_a_ca_that_would_end_first_is_replaced() -> None:
    files = await make_certificate(HOST, {"ca.crt": "no certificate", "ca.key": ""})
    assert await lasts(files["ca.crt"], 3649)
