"""What is done to every request before a route is looked for: the path's last slash, and browsers' questions."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

PREFLIGHT_S = 600


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
