"""The page that describes the HTTP port's routes to programs (OpenAPI 3.1): bodies by the models that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from coserve_agent.http.errors import ANTHROPIC_ROUTE
from coserve_agent.messages import request as messages
from coserve_agent.openai.tokens import DetokenizeRequest, TokenizeRequest
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.completion import CompletionRequest
from coserve_agent.requests.supported import NEUTRAL, Neutral
from coserve_agent.responses import request as responses

PATH = "/openapi.json"
_REFS = "#/components/schemas/{model}"
_ANTHROPIC_ERROR = "AnthropicError"
_TEXT = {"type": "string"}
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    _ANTHROPIC_ERROR: {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {"type": _TEXT, "message": _TEXT},
                "required": ["type", "message"],
            },
        },
        "required": ["type", "error"],
    },
}
_STATUSES = {
    "400": "a field is wrong, or is not supported: the message names it",
    "404": "the model is not served here",
    "413": "the body is too large",
    "429": "too many requests wait; see retry-after",
    "500": "the server made a mistake, or its engine ended",
    "503": "the model, or an adapter, is being loaded; see retry-after",
}


@dataclass(frozen=True)
class _Route:
    """A route with a body. `neutral`: parameters that may be sent and change nothing. An answer has the fields
    `answer`.
    """

    body: type[BaseModel]
    answer: tuple[str, ...]
    neutral: Mapping[str, Neutral] = field(default_factory=dict)
    statuses: tuple[str, ...] = tuple(_STATUSES)

    @property
    def streams(self) -> bool:
        return "stream" in self.body.model_fields


_BODY_ALONE = ("400", "413", "500")
_CHOICES = ("id", "object", "created", "model", "choices", "usage")
_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
_ROUTES: Mapping[str, _Route] = {
    "/v1/chat/completions": _Route(ChatRequest, _CHOICES, NEUTRAL),
    "/v1/completions": _Route(CompletionRequest, _CHOICES, NEUTRAL),
    "/v1/responses": _Route(
        responses.ResponsesRequest, ("id", "object", "status", "model", "output", "usage"), responses.NEUTRAL
    ),
    ANTHROPIC_ROUTE: _Route(messages.MessagesRequest, _MESSAGE, messages.NEUTRAL),
    f"{ANTHROPIC_ROUTE}/count_tokens": _Route(messages.CountTokensRequest, ("input_tokens",), messages.NEUTRAL),
    "/tokenize": _Route(TokenizeRequest, ("tokens", "count", "max_model_len"), statuses=_BODY_ALONE),
    "/detokenize": _Route(DetokenizeRequest, ("prompt",), statuses=_BODY_ALONE),
}


def add(app: FastAPI, version: str) -> None:
    """Let `app` answer with the page of its own routes."""

    @lru_cache(1)
    def page() -> dict[str, Any]:
        return described(app, version)

    @app.get(PATH, include_in_schema=False)
    def openapi() -> dict[str, Any]:
        return page()


def described(app: FastAPI, version: str) -> dict[str, Any]:
    """The page."""
    document = get_openapi(title="coserve", version=version, routes=app.routes)
    models = [(route.body, "validation") for route in _ROUTES.values()]
    named, definitions = models_json_schema(models, ref_template=_REFS)  # type: ignore[arg-type]
    schemas = {**definitions["$defs"], **_SCHEMAS}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own: bodies and names are read otherwise
            if "parameters" in operation:
                operation["responses"] |= _errors(path, ("404", "503"))
    for path, route in _ROUTES.items():
        operation = document["paths"][path]["post"]
        reference = named[(route.body, "validation")]
        _open(schemas[reference["$ref"].rpartition("/")[2]], route.neutral)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        answer = {"type": "object", "required": list(route.answer)}
        content = {"application/json": {"schema": answer}}
        if route.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation["responses"] = {"200": {"description": "the answer", "content": content}}
        operation["responses"] |= _errors(path, route.statuses)
    document["components"] = {"schemas": schemas}
    return document


def _open(schema: dict[str, Any], neutral: Mapping[str, Neutral]) -> None:
    """Say in the schema of a body what is no field of its model: a model's name may be left out, and what changes
    nothing may be there.
    """
    schema["required"] = [name for name in schema.get("required", ()) if name != "model"]
    said = {"description": "changes nothing at its usual value; another that would is refused"}
    schema["properties"] |= {name: said for name in neutral if name not in schema["properties"]}


def _errors(path: str, statuses: tuple[str, ...]) -> dict[str, Any]:
    name = _ANTHROPIC_ERROR if path.startswith(ANTHROPIC_ROUTE) else "Error"
    content = {"application/json": {"schema": {"$ref": _REFS.format(model=name)}}}
    return {status: {"description": _STATUSES[status], "content": content} for status in statuses}
