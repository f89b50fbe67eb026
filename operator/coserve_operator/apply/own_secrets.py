"""Secrets that the operator makes in its own namespace, so that no chart has to: the keys, and the metrics API's
certificate. Pods that need one wait for it, since the kubelet starts none without.
"""

import asyncio
import logging
import secrets
import tempfile
from base64 import b64decode, b64encode
from pathlib import Path

from pydantic import SecretStr

from coserve_operator.kube import SECRET, ConflictError, Kube, KubeError, Manifest, NotFoundError, UnavailableError
from coserve_operator.manifests.metadata import MANAGED_BY
from coserve_operator.settings import Settings

logger = logging.getLogger(__name__)

PREVIOUS_KEY = "endpoint-key-previous"
"""Optional: the endpoint-key before, while it is being changed."""
ENDPOINT_KEY, METRICS_PASSWORD, REDIS_PASSWORD = "endpoint-key", "metrics-password", "redis-password"
LOOK_EVERY_S, AGAIN_S = 60.0, 2.0
CA_DAYS, DAYS, RENEW_DAYS = 3650, 365, 120
DAY_S = 86400


class AccessError(Exception):
    """The Secret with the keys cannot be used."""


async def with_access(settings: Settings, kube: Kube) -> Settings:
    """Return the settings with the keys of `access_secret`, which is made where there is none; what is set stays."""
    name, namespace = settings.access_secret, settings.namespace
    if not name:
        return settings
    while True:
        try:
            data = (await _read_or_create(kube, namespace, name)).get("data") or {}
            break
        except UnavailableError as error:
            logger.warning("Secret %s/%s: %s", namespace, name, error)
            await asyncio.sleep(AGAIN_S)
    missing = {ENDPOINT_KEY, METRICS_PASSWORD, REDIS_PASSWORD} - data.keys()
    if missing:
        raise AccessError(f"Secret {namespace}/{name} has no key {', '.join(sorted(missing))}: add it")
    known = {key: SecretStr(b64decode(value).decode()) for key, value in data.items()}
    return settings.model_copy(
        update={
            "endpoint_key": known[ENDPOINT_KEY],
            "metrics_password": known[METRICS_PASSWORD],
            "redis_password": settings.redis_password or known[REDIS_PASSWORD],
            "endpoint_key_previous": known.get(PREVIOUS_KEY, settings.endpoint_key_previous),
        }
    )


async def _read_or_create(kube: Kube, namespace: str, name: str) -> Manifest:
    """Create first, so that two replicas that start at once have the same keys."""
    keys = {key: secrets.token_hex(20) for key in (ENDPOINT_KEY, METRICS_PASSWORD, REDIS_PASSWORD)}
    try:
        return await kube.create(_secret(namespace, name, "Opaque", keys))
    except ConflictError:
        return await kube.get(SECRET, namespace, name)


class ServingCertificate:
    """Keeps a certificate for `host` in a Secret: tls.crt, tls.key, ca.crt, and ca.key to renew it with."""

    def __init__(self, kube: Kube, namespace: str, name: str, host: str) -> None:
        self._kube, self._namespace, self._name, self._host = kube, namespace, name, host

    async def run(self) -> None:
        """Make it, and look each minute whether it is there and not about to end."""
        while True:
            try:
                await self.ensure()
            except KubeError as error:
                logger.warning("Secret %s/%s: %s", self._namespace, self._name, error)
                await asyncio.sleep(AGAIN_S)
            else:
                await asyncio.sleep(LOOK_EVERY_S)

    async def ensure(self) -> None:
        """Create the Secret where there is none; renew what is about to end."""
        try:
            found = await self._kube.get(SECRET, self._namespace, self._name)
        except NotFoundError:
            files = await make_certificate(self._host, {})
            try:
                await self._kube.create(_secret(self._namespace, self._name, "kubernetes.io/tls", files))
            except ConflictError:
                return  # the next look reads it
            logger.info("made Secret %s/%s", self._namespace, self._name)
            return
        files = {key: b64decode(value).decode() for key, value in (found.get("data") or {}).items()}
        if await lasts(files.get("tls.crt", ""), RENEW_DAYS):
            return
        files = await make_certificate(self._host, files)
        renewed = _secret(self._namespace, self._name, "kubernetes.io/tls", files)
        await self._kube.merge(SECRET, self._namespace, self._name, {"data": renewed["data"]})
        logger.info("renewed Secret %s/%s", self._namespace, self._name)


async def make_certificate(host: str, files: dict[str, str]) -> dict[str, str]:
    """Return PEM files for `host`, by the CA in `files` where it outlasts the certificate, else by a new one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        if "ca.key" in files and await lasts(files.get("ca.crt", ""), DAYS):
            for file in ("ca.crt", "ca.key"):
                (folder / file).write_text(files[file])
        else:
            signing = ("-subj", "/CN=coserve-metrics-api-ca", "-addext", "keyUsage=critical,keyCertSign")
            ending = ("-days", str(CA_DAYS), "-keyout", "ca.key", "-out", "ca.crt")
            await _openssl(folder, "req", "-x509", *key, *signing, *ending)
        await _openssl(folder, "req", *key, "-subj", "/CN=coserve-metrics-api", "-keyout", "tls.key", "-out", "csr")
        (folder / "extensions").write_text(
            f"subjectAltName=DNS:{host}\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
            "basicConstraints=critical,CA:FALSE\nauthorityKeyIdentifier=keyid\n"
        )
        serial = ("-set_serial", f"0x{secrets.token_hex(16)}")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", *serial, "-days", str(DAYS), "-extfile", "extensions")
        await _openssl(folder, "x509", "-req", "-in", "csr", *signed, "-out", "tls.crt")
        return {file: (folder / file).read_text() for file in ("tls.crt", "tls.key", "ca.crt", "ca.key")}


async def lasts(certificate: str, days: int) -> bool:
    """Return whether a PEM certificate is one, and valid for so many days more."""
    code, _ = await _run("openssl", "x509", "-noout", "-checkend", str(days * DAY_S), stdin=certificate)
    return code == 0


async def _openssl(folder: Path, *words: str) -> None:
    code, output = await _run("openssl", *words, folder=folder)
    if code != 0:
        raise RuntimeError(f"openssl {words[0]} ended with {code}: {output}")


async def _run(*words: str, folder: Path | None = None, stdin: str = "") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


def _secret(namespace: str, name: str, type_: str, files: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": SECRET.name,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": MANAGED_BY | {"app.kubernetes.io/part-of": "coserve"},
        },
        "type": type_,
        "data": {file: b64encode(content.encode()).decode() for file, content in files.items()},
    }
