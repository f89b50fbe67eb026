"""A tenant is a namespace. Where each has a Redis of its own, all who use one find it by its namespace alone."""

import hashlib
import hmac
from dataclasses import dataclass

PLACE = "{redis}"
"""Stands in a URL for the name of a namespace's own Redis; without it one Redis serves all."""
PREFIX = "coserve-redis-"
LONGEST = 63 - len(PREFIX)


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """How an endpoint's agents and feeders reach Redis: `ca` (PEM) verifies a rediss:// one, and is empty for what the
    system trusts; `digest` is another for whatever else changes.
    """

    url: str
    username: str
    password: str
    ca: str = ""
    digest: str = ""


def redis_name(namespace: str) -> str:
    """Return the name of a namespace's own Redis. Those of long namespaces have the greatest length, and no others."""
    if len(namespace) < LONGEST:
        return PREFIX + namespace
    digest = hashlib.sha256(namespace.encode()).hexdigest()[:16]
    return f"{PREFIX}{namespace[: LONGEST - len(digest) - 1]}-{digest}"


def redis_url(url: str, namespace: str) -> str:
    """Return the URL of the Redis that serves a namespace."""
    return url.replace(PLACE, redis_name(namespace))


def redis_password(master: str, namespace: str) -> str:
    """Return the password of the administrator of a namespace's own Redis."""
    return hmac.new(master.encode(), f"redis of {namespace}".encode(), hashlib.sha256).hexdigest()


def access_digest(key: bytes, *parts: str) -> str:
    """Return the digest for a name that others see: it needs the key, so that nobody finds out a password by it."""
    return hmac.new(key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:10]
