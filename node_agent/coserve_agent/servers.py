"""uvicorn inside the agent's own loop: sockets bound beforehand, signals left to the agent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from coserve_agent.errors import StartError

# Longer than the idle time of common clients' and proxies' pools, so that the client closes first.
KEEP_ALIVE_S = 75
GRACEFUL_S = 3
BACKLOG = 2048


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
    """Serves one application on a listening socket, which it closes in the end."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._socket = listener
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            app,
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

    def stop(self) -> None:
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
