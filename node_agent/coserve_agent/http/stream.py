"""Answers that end when the client leaves: server-sent events, and a watch over requests that are answered at once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coserve_agent.concurrency import end
from coserve_agent.http.errors import ApiError, mistake

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads the answer."""


# What splits lines for str.splitlines, by which httpx and others read events, and stands bare in JSON.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event: a single line, by whatever rule its reader splits lines."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


def typed_event(data: dict[str, Any]) -> bytes:
    """The same, named by its `type`."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


def error_event(error: ApiError) -> bytes:
    return event(error.body())


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection.

    Raises:
        ClientGoneError: the client left first.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await end(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `on_end` is called exactly once, as soon as the last is sent or the client has left.

    An error after the first event becomes an event of its own, as `failed` writes it: the status is sent already.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], on_end: Callable[[], None], failed: Callable[[ApiError], bytes]
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGoneError):
                await unless_gone(receive, self._write(scope["path"], send))
        finally:
            self._on_end()

    async def _write(self, path: str, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("%s: the agent's own mistake in the middle of a stream", path)
            said = error if isinstance(error, ApiError) else mistake()
            await send({"type": "http.response.body", "body": self._failed(said), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
