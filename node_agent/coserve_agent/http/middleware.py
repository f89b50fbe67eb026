"""What every request and answer gets, whatever its route: a path without its last slash, what a browser asks before,
a body where a handler failed, and notice of the connection's end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve_agent.http.errors import mistake

log = logging.getLogger(__name__)

CLOSE = (b"connection", b"close")
PREFLIGHT_S = 600


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
            await mistake().response(scope["path"])(scope, receive, send)


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


class TrailingSlash:
    """/v1/models/ is /v1/models. A redirect would need the address by which the client knows us."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def wrap(app: ASGIApp, cors_origins: Sequence[str]) -> ASGIApp:
    """`app` behind both. Pages of `cors_origins` may call it from a browser; "*" are all, none: no page may.

    It is outside of the application's own handlers, so that a page can read its errors, too.
    """
    app = TrailingSlash(app)
    if not cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("retry-after",),
        max_age=PREFLIGHT_S,
    )
