"""Messages of a chat as clients send them, and as the chat template gets them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coserve_agent.chat_format import Message, text_part
from coserve_agent.http.errors import ApiError, bad_request

_TEXT_FIELDS: Mapping[object, str] = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
}


class RequestModel(BaseModel):
    """A part of a request. A field that is null is a field that is not there; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        return without_nulls(value)


def without_nulls(value: object) -> object:
    """An object without its fields that are null; anything else as it is."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


class ToolFunction(RequestModel):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = ""


class ToolCall(RequestModel):
    """What an assistant called in an earlier turn."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Annotated[str, Field(max_length=32)] = "function"
    function: ToolFunction
    index: int | None = None


class ChatMessage(RequestModel):
    """One message. Content parts are kept if they are text; other kinds are refused."""

    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: str | list[str | dict[str, Any]] = Field(default_factory=list)
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] = Field(default_factory=list)
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self, reads_tool_calls: bool) -> dict[str, Any]:
        """What the chat template gets: its content is a string or a list of text parts.

        Raises:
            ApiError: 400 for a part that is not text, and for tool calls that the template would not show.
        """
        shown: dict[str, Any] = {"role": self.role, "content": self._content()}
        if self.tool_calls:
            if not reads_tool_calls:
                raise _unsupported(
                    "messages has tool_calls, which this model's chat template does not write; remove them"
                )
            shown["tool_calls"] = [_tool_call(call) for call in self.tool_calls]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return shown | {name: value for name, value in optional.items() if value is not None}

    def _content(self) -> str | list[dict[str, str]]:
        if isinstance(self.content, str):
            return self.content
        texts = [part if isinstance(part, str) else _text_of(part) for part in self.content]
        return [text_part(text) for text in texts if text is not None]


def characters(messages: list[dict[str, Any]]) -> int:
    """How much text there is to encode, at least: of calls their JSON."""
    total = 0
    for message in messages:
        content = message["content"] or ""
        total += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        total += len(json.dumps(message.get("tool_calls")))
    return total


def _text_of(part: Mapping[str, Any]) -> str | None:
    """The text of a content part; None where it is null, which vLLM skips, too."""
    kind = part.get("type")
    field = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise _unsupported(
            f"messages has a content part of type {kind!r}; only parts of type 'text' are supported, remove it"
        )
    text = part.get(field)
    if not isinstance(text, str | None):
        raise bad_request(
            f"messages has a content part whose {field} is {text!r:.80}; send a string", "messages", "invalid_value"
        )
    return text


def _tool_call(call: ToolCall) -> Message:
    """As templates expect it: arguments are an object, not the JSON that OpenAI's API has for it."""
    shown = {"type": call.type, **call.model_dump(exclude_unset=True)}
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            shown["function"]["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise bad_request(
                f"messages has a call of {call.function.name!r} with arguments {arguments[:80]!r}, which are no JSON "
                f"({error}); send JSON",
                "messages",
                "invalid_value",
            ) from None
    return shown


def _unsupported(message: str) -> ApiError:
    return bad_request(message, "messages", "unsupported_parameter")
