"""Replies of a Redis that tenants write to: whatever stands there, none takes more than a bound of memory."""

from typing import Any

from redis._parsers.hiredis import _AsyncHiredisParser
from redis.asyncio import Redis
from redis.exceptions import InvalidResponse

from coserve_contract.connect import connect

REPLY_BYTES = 8 << 20


class ReplyTooLargeError(InvalidResponse):
    """A reply of more than REPLY_BYTES. The connection is given up with it: what is left of the reply is not read."""


class BoundedParser(_AsyncHiredisParser):
    """Counts the bytes that come in for one reply."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._left = REPLY_BYTES

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        """One reply."""
        self._left = REPLY_BYTES
        return await super().read_response(*arguments, **options)

    async def read_from_socket(self) -> Any:
        """A part of one."""
        if self._left <= 0:
            raise ReplyTooLargeError(f"a reply of more than {REPLY_BYTES} bytes")
        self._left -= self._read_size
        return await super().read_from_socket()  # type: ignore[no-untyped-call]


def connect_bounded(url: str, username: str | None, password: str | None, ca: str = "") -> Redis:
    """A client as `connect` makes it, whose replies are bounded."""
    return connect(url, username, password, ca, parser_class=BoundedParser)
