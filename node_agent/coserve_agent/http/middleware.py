"""What every answer gets, whatever route made it: a body where a handler failed, and notice of the connection's end."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve_agent.http.errors import mistake

log = logging.getLogger(__name__)

CLOSE = (b"connection", b"close")


class AnswerMistakes:
    """Answers 500 where a handler raises, on a connection that stays usable.

    Starlette's own handler answers and raises on, upon which uvicorn closes the connection unannounced: the client's
    next request on it fails, which is not the one that was at fault.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            if started or scope["type"] != "http":
                raise  # half an answer is out: only a broken connection says that it is no whole one
            log.exception("%s %s: the agent's own mistake", scope["method"], scope["path"])
            await mistake().response()(scope, receive, send)


class CloseWhileDraining:
    """Says `Connection: close` in every answer that begins while the agent drains, so that clients leave by themselves
    and none sends a request into a connection that is being closed.
    """

    def __init__(self, app: ASGIApp, draining: Callable[[], bool]) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and self._draining():
                message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
            await send(message)

        await self._app(scope, receive, sending)
