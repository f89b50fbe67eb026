"""What every answer gets, whatever route made it: a body where a handler failed."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve_agent.http.errors import mistake

log = logging.getLogger(__name__)


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
