"""Requests for text as tokens, and for tokens as text: vLLM's two routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, StrictBool, StrictInt, ValidationError

from coserve_agent.chat.message import StrictModel
from coserve_agent.requests.common import explain


class TokenizeRequest(StrictModel):
    """Of a text. What the tokenizer begins a text with stands before it, unless `add_special_tokens` is false."""

    model: str | None = None
    prompt: str
    add_special_tokens: StrictBool = True


class DetokenizeRequest(StrictModel):
    model: str | None = None
    tokens: list[Annotated[StrictInt, Field(ge=0)]]


R = TypeVar("R", TokenizeRequest, DetokenizeRequest)


def parse_tokens(kind: type[R], body: Mapping[str, Any]) -> R:
    """Raises ApiError 400 naming the field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise explain(error) from None
