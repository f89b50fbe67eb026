"""One HTTP connection of uvicorn's that nothing is lost on when it is closed.

uvicorn closes a socket at once. Where the client is still sending, the kernel then answers with a reset, which takes
the answer with it; and a request that reached an idle connection's socket is thrown away unread.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_S = 2.0
"""How long a client that was told of the end may go on sending before its connection is cut."""


class LingeringTransport(asyncio.Transport):
    """Closes in two steps, as RFC 9112 asks for in section 9.6: ends the sending side, and reads what the client still
    sends until it closes too, or LINGER_S have passed. Whoever owns the protocol throws away what comes meanwhile.
    """

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._lingers = False

    def close(self) -> None:
        if self.is_closing():
            return
        self._lingers = True
        self._inner.resume_reading()
        try:
            self._inner.write_eof()
        except OSError:  # the client has reset it, which the loop has not heard of yet
            self._inner.abort()
        self._loop.call_later(LINGER_S, self._inner.close)

    def is_closing(self) -> bool:
        return self._lingers or self._inner.is_closing()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self._lingers:
            self._inner.write(data)

    def pause_reading(self) -> None:
        if not self._lingers:
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)


class Connection(H11Protocol):
    """Knows for how long it has been idle, and is not closed over a request that has come in."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._idle_since_s = self.loop.time()
        super().connection_made(LingeringTransport(transport, self.loop))

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def on_response_complete(self) -> None:
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    def is_idle(self, for_s: float) -> bool:
        """Whether no request has been under way, or half here, for so long."""
        return self.transport.is_closing() or (
            not self._in_request() and self.loop.time() - self._idle_since_s >= for_s and not self._has_input()
        )

    def shutdown(self) -> None:
        """End it: now if it is idle, else after the answer that is under way."""
        if self._in_request() or not self._has_input():
            super().shutdown()

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _has_input(self) -> bool:
        """Whether some of a request is here: read already, or in the kernel still."""
        if self.conn.trailing_data[0]:
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))
