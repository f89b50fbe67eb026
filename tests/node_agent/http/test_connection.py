"""Connections that are closed so that nothing is lost on them. Each test's control is uvicorn's own way."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from coserve_agent.http import servers
from coserve_agent.http.connection import Connection
from coserve_agent.http.middleware import CloseWhileDraining
from coserve_agent.http.servers import Server, listen

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_BYTES = 64 << 20
"""More than the kernel's buffers hold, so that the client is still sending when it is answered."""


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body, as a refusal does."""
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running(draining: Callable[[], bool] = lambda: False) -> AsyncIterator[Server]:
    server = Server(CloseWhileDraining(early, draining), listen("127.0.0.1", 0, "PORT"))
    task = asyncio.create_task(server.run_until_stopped())
    try:
        await until(lambda: server.started)
        yield server
    finally:
        server.stop()
        await task


def client(server: Server) -> socket.socket:
    """A connection that the kernel has taken, whatever the server's loop does."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


async def answer_of(one: socket.socket) -> bytes:
    """All that comes until the other side ends. Raises ConnectionResetError where it does not end but cut."""

    def read() -> bytes:
        data = b""
        while part := one.recv(1 << 16):
            data += part
        return data

    with one:
        return await asyncio.to_thread(read)


async def one_answer(one: socket.socket) -> bytes:
    """The next answer on a connection that goes on."""

    def read() -> bytes:
        data = b""
        while not data.endswith(b"done"):
            part = one.recv(1 << 16)
            assert part, data
            data += part
        return data

    return await asyncio.to_thread(read)


async def answer_while_sending() -> bytes:
    """The answer to a request of which the client sends everything before it reads."""
    async with running(lambda: True) as server:
        with client(server) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % BODY_BYTES
            await asyncio.to_thread(one.sendall, head + bytes(BODY_BYTES))
            return await answer_of(one)


async def test_a_client_that_is_still_sending_gets_its_answer() -> None:
    answer = await answer_while_sending()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer
    assert answer.endswith(b"done")


async def test_with_uvicorns_connection_it_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "Connection", H11Protocol)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await answer_while_sending()


async def answer_to_a_request_that_races_with_the_end(close: Callable[[Server], None]) -> bytes:
    """The connection is idle as far as the server has read, and a request is in the kernel."""
    async with running(lambda: True) as server:
        one = client(server)
        await until(lambda: bool(server.server_state.connections))
        one.sendall(GET)
        close(server)
        return await answer_of(one)


def shut_down(server: Server) -> None:
    for one in list(server.server_state.connections):
        one.shutdown()


async def test_a_request_that_has_come_in_is_answered() -> None:
    assert (await answer_to_a_request_that_races_with_the_end(shut_down)).endswith(b"done")


async def test_uvicorns_connection_throws_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "Connection", H11Protocol)
    try:
        answer = await answer_to_a_request_that_races_with_the_end(shut_down)
    except ConnectionResetError:
        answer = b""
    assert answer == b""


async def test_connections_in_the_listeners_queue_are_served() -> None:
    async with running(lambda: True) as server:
        ones = [client(server) for _ in range(20)]
        await server.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            client(server)
        for one in ones:
            one.sendall(GET)
        assert all(answer.endswith(b"done") for answer in await asyncio.gather(*map(answer_of, ones)))


async def test_a_listener_that_is_only_closed_resets_them() -> None:
    async with running() as server:
        one = client(server)
        for listener in server.servers:
            listener.close()
        with pytest.raises(ConnectionResetError):
            await answer_of(one)


async def test_a_connection_that_the_client_has_reset_is_closed_quietly() -> None:
    async with running() as server:
        one = client(server)
        await until(lambda: bool(server.server_state.connections))
        (connection,) = server.server_state.connections
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        with pytest.raises(OSError):  # the control
            connection.transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        connection.transport.close()
        await until(lambda: not server.server_state.connections)


async def test_what_is_idle_is_closed_once_all_are() -> None:
    async with running() as server:
        asked, half = client(server), client(server)
        asked.sendall(GET)
        half.sendall(GET[:10])
        await until(lambda: len(server.server_state.connections) == 2)
        answered = await one_answer(asked)
        assert b"connection: close" not in answered
        closing = asyncio.create_task(server.close_idle(0.0))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closing.done()  # half a request is none that may be dropped
        asked.sendall(GET)
        await one_answer(asked)
        half.sendall(GET[10:])
        await one_answer(half)
        await closing
        assert await answer_of(asked) == await answer_of(half) == b""


async def test_idle_is_counted_from_the_last_answer() -> None:
    async with running() as server:
        with client(server) as one:
            one.sendall(GET)
            await one_answer(one)
            (connection,) = server.server_state.connections
            assert isinstance(connection, Connection)
            assert connection.is_idle(0.0)
            assert not connection.is_idle(3600.0)


def test_uvicorn_has_what_is_overridden() -> None:
    """These are no documented hooks of uvicorn's but `http=`: a release without them is to fail here."""
    assert {"connection_made", "data_received", "on_response_complete", "shutdown"} <= vars(H11Protocol).keys()
    assert {"capture_signals", "serve", "shutdown"} <= vars(uvicorn.Server).keys()
