"""Who may ask the metrics API: the API server's front proxy, which knows the user already."""

import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve_operator.kube import CONFIG_MAP, Kube

NAMESPACE, NAME = "kube-system", "extension-apiserver-authentication"


@dataclass(frozen=True, slots=True)
class Trust:
    """The front proxy's CA (PEM), and the common names it may have; with none given, every name of that CA is fine."""

    ca: str
    names: frozenset[str]

    def admits(self, certificate: dict[str, Any] | None) -> bool:
        """Return whether a verified client certificate (as ssl returns it) is the front proxy's."""
        if not certificate:
            return False
        subject = dict(pair for part in certificate.get("subject", ()) for pair in part)
        return not self.names or subject.get("commonName") in self.names


async def read_trust(kube: Kube) -> Trust:
    """Read whom the API server told extension servers to trust."""
    data = (await kube.get(CONFIG_MAP, NAMESPACE, NAME)).get("data") or {}
    ca = data.get("requestheader-client-ca-file")
    if not ca:
        raise RuntimeError(
            f"ConfigMap {NAMESPACE}/{NAME} has no requestheader-client-ca-file: the API server runs without an "
            "aggregation layer (--requestheader-client-ca-file); install the chart with metricsApi.mode=None"
        )
    return Trust(ca, frozenset(json.loads(data.get("requestheader-allowed-names") or "[]")))


def server_context(trust: Trust, certificates: Path) -> ssl.SSLContext:
    """Return a TLS context that verifies a client's certificate if it shows one; the kubelet's probes have none.

    `certificates` is the folder of our own tls.crt and tls.key.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=trust.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    load_certificate(context, certificates)
    return context


def load_certificate(context: ssl.SSLContext, certificates: Path) -> None:
    """Show the certificate in the folder to those who connect from now on."""
    context.load_cert_chain(certificates / "tls.crt", certificates / "tls.key")
