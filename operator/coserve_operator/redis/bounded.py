"""Replies of a Redis that tenants write to: whatever stands there, none takes more than a bound of memory, nor do those
of one round trip together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from redis._parsers.hiredis import _AsyncHiredisParser
from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, InvalidResponse

from coserve_contract.connect import connect

REPLY_BYTES, ROUND_TRIP_BYTES = 8 << 20, 16 << 20


class ReplyTooLargeError(InvalidResponse):
    """More bytes than are read. The connection is given up with it: what is left is not read."""


class _Bound:
    """Bytes that may still come in."""

    def __init__(self, most: int) -> None:
        self.left = most


_ROUND_TRIP: ContextVar[_Bound | None] = ContextVar("round trip", default=None)


@contextmanager
def round_trip() -> Iterator[None]:
    """What is read within has ROUND_TRIP_BYTES together at most."""
    before = _ROUND_TRIP.set(_Bound(ROUND_TRIP_BYTES))
    try:
        yield
    finally:
        _ROUND_TRIP.reset(before)


class BoundedParser(_AsyncHiredisParser):
    """Counts the bytes that come in for one reply, and for one round trip."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._reply = _Bound(REPLY_BYTES)
        self._reader: Any
        self._stream: Any

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        """One reply."""
        self._reply = _Bound(REPLY_BYTES)
        return await super().read_response(*arguments, **options)

    async def read_from_socket(self) -> Any:
        """A part of one. What more comes in with it is counted with it."""
        together = _ROUND_TRIP.get()
        if self._reply.left <= 0:
            raise ReplyTooLargeError(f"a reply of more than {REPLY_BYTES} bytes")
        if together is not None and together.left <= 0:
            raise ReplyTooLargeError(f"more than {ROUND_TRIP_BYTES} bytes together")
        found = await self._stream.read(self._read_size)
        if not found:
            raise ConnectionError(SERVER_CLOSED_CONNECTION_ERROR)
        self._reader.feed(found)
        self._reply.left -= len(found)
        if together is not None:
            together.left -= len(found)
        return True


def connect_bounded(url: str, username: str | None, password: str | None, ca: str = "") -> Redis:
    """A client as `connect` makes it, whose replies are bounded."""
    return connect(url, username, password, ca, parser_class=BoundedParser)
