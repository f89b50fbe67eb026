"""How every part connects to Redis, and the one place where the client's loose types are narrowed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

COMMAND_S = 5.0


def connect(
    url: str, username: str | None = None, password: str | None = None, ca: str = "", **connection: Any
) -> Redis:
    """A client that returns bytes and reconnects by itself; use it through `command`. No connection is made yet.

    `ca` in PEM verifies a rediss:// server, by default the system's do; its name has to be that of the URL.
    `connection`: further arguments of redis.asyncio.Connection.
    """
    if url.startswith("rediss:"):
        connection |= {"ssl_check_hostname": True, **({"ssl_ca_data": ca} if ca else {})}
    if not url.startswith("unix:"):
        connection["socket_keepalive"] = True
    client: Redis = Redis.from_url(
        url,
        username=username,
        password=password,
        decode_responses=False,
        socket_connect_timeout=5.0,
        health_check_interval=15,
        **connection,
    )
    return client


def command_time() -> asyncio.Timeout:
    """How long something may take; TimeoutError (an OSError) after 5 s.

    Not by the client's socket_timeout: before Python 3.12 that swallows a task's cancellation now and then.
    """
    return asyncio.timeout(COMMAND_S)


async def command(redis: Redis, *arguments: str | bytes | int | float) -> Any:
    """One Redis command, within `command_time`."""
    async with command_time():
        return await redis.execute_command(*arguments)  # type: ignore[no-untyped-call]


async def run_script(redis: Redis, script: str, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
    """Run a Lua script by its digest, and by its text where the server does not know it (a fresh or emptied Redis)."""
    digest = hashlib.sha1(script.encode()).hexdigest()
    try:
        return await command(redis, "EVALSHA", digest, len(keys), *keys, *arguments)
    except NoScriptError:
        return await command(redis, "EVAL", script, len(keys), *keys, *arguments)
