"""What Redis' certificate is verified with. Who holds it in memory ends when it is renewed, and starts anew with it."""

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 60.0
CA, CERTIFICATE = "ca.crt", "tls.crt"


class TlsRenewedError(Exception):
    """The files have changed: the process must start anew."""


@dataclass(frozen=True, slots=True)
class RedisTls:
    """`ca` in PEM; `digest` is that of the CA and of the certificate, where it is ours."""

    ca: str = ""
    digest: str = ""


NO_TLS = RedisTls()


def read_tls(folder: Path | None) -> RedisTls:
    """Return what is in the folder of a mounted Secret."""
    if folder is None:
        return NO_TLS
    ca, certificate = (folder / CA).read_bytes(), folder / CERTIFICATE
    whole = ca + (certificate.read_bytes() if certificate.exists() else b"")
    return RedisTls(ca.decode(), hashlib.sha256(whole).hexdigest()[:16])


async def until_renewed(folder: Path | None, known: RedisTls) -> None:
    """Wait, and raise TlsRenewedError when the folder holds something else."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if await asyncio.to_thread(read_tls, folder) != known:
            raise TlsRenewedError(f"the certificates in {folder} have changed: starting anew with them")
