"""uvicorn inside the agent's own loop: sockets bound beforehand, signals left to the agent, an end in three steps."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from coserve_agent.errors import StartError
from coserve_agent.http.connection import Connection

# Longer than the idle time of common clients' and proxies' pools, so that the client closes first.
KEEP_ALIVE_S = 75
GRACEFUL_S = 3  # more than a connection lingers
BACKLOG = 2048
TICK_S = 0.05


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A listening socket; port 0 is chosen by the kernel.

    Raises:
        StartError: the port cannot be had; `variable` set it.
    """
    try:
        return socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        raise StartError(
            f"{variable} is {port}: cannot listen on {host}:{port} ({error.strerror}); free the port or choose another"
        ) from None


class Server(uvicorn.Server):
    """Serves one application on a listening socket, which it closes in the end.

    `stop` ends it. To lose nothing, `stop_listening` first, then `close_idle`.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._socket = listener
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACEFUL_S,
        )
        super().__init__(config)

    async def run_until_stopped(self) -> None:
        try:
            await self.serve(sockets=[self._socket])
        finally:
            self._socket.close()

    async def stop_listening(self) -> None:
        """Refuse new connections. Those that the kernel has taken already are served; a mere close would reset them."""
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        await asyncio.sleep(0)  # one turn, in which what asyncio has taken becomes a connection of its server's
        taken = list(_accept_all(self._socket))
        for server in self.servers:
            server.close()
        for one in taken:
            await loop.connect_accepted_socket(self._connection, one)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    async def close_idle(self, after_s: float) -> None:
        """Once every connection has been idle for `after_s` seconds, close them all, in one go."""
        while True:
            connections = self._connections()
            if all(one.is_idle(after_s) for one in connections):
                break
            await asyncio.sleep(TICK_S)
        for one in connections:
            one.shutdown()

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]

    def stop(self) -> None:
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _accept_all(listener: socket.socket) -> Iterator[socket.socket]:
    """What waits in the listener's queue, as far as there are file descriptors."""
    with suppress(OSError):
        while True:
            one, _ = listener.accept()
            one.setblocking(False)
            yield one
