"""Errors as clients expect them: OpenAI's {"error": {message, type, param, code}}, and on Anthropic's routes
{"type": "error", "error": {type, message}}.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

CLIENT_CLOSED = 499

_TYPES = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC_ROUTE = "/v1/messages"


class ApiError(Exception):
    """An answer that refuses a request; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """Whatever it quotes, it can be sent."""
        return str(self).encode("utf-8", "backslashreplace").decode()

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """In the form of the route at `path`."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        anthropic = path == ANTHROPIC_ROUTE or path.startswith(f"{ANTHROPIC_ROUTE}/")
        return JSONResponse(self.anthropic_body() if anthropic else self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def mistake() -> ApiError:
    """The agent's own, which its log explains."""
    return ApiError(500, "the server made a mistake; see the agent's log", code="internal_error")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this. 499 is nginx's status for it."""
    return Response(status_code=CLIENT_CLOSED)


async def on_unknown_path(request: Request, error: Exception) -> JSONResponse:
    message = f"{request.method} {request.url.path}: no such route; try POST /v1/chat/completions or GET /v1/models"
    return ApiError(404, message, code="not_found").response(request.url.path)


async def on_wrong_method(request: Request, error: Exception) -> JSONResponse:
    headers = getattr(error, "headers", None) or {}
    allowed = headers.get("Allow", headers.get("allow", "another method"))
    message = f"{request.url.path} does not take {request.method}; use {allowed}"
    return ApiError(405, message, code="method_not_allowed").response(request.url.path)
