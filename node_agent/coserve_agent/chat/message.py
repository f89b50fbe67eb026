"""Messages of a chat as clients and data sets write them, and as the chat template gets them.

One model reads both, so that what is learned is what is served.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coserve_agent import strict_json
from coserve_agent.chat.format import plain, text_part
from coserve_agent.chat.template import Message
from coserve_agent.errors import AgentError

_TEXT_FIELDS: Mapping[object, str] = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
}


class MessageError(AgentError):
    """What is wrong with a message, and the remedy. `unsupported`: it is well-formed, and asks for what is missing."""

    def __init__(self, message: str, *, unsupported: bool = False, public: str | None = None) -> None:
        super().__init__(message, public)
        self.unsupported = unsupported


class StrictModel(BaseModel):
    """What a client wrote. A field that is null is a field that is not there; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        return without_nulls(value)


def without_nulls(value: object) -> object:
    """An object without its fields that are null; anything else as it is."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


class ToolFunction(StrictModel):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = ""


class ToolCall(StrictModel):
    """What an assistant called in an earlier turn."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Annotated[str, Field(max_length=32)] = "function"
    function: ToolFunction
    index: int | None = None


class ChatMessage(StrictModel):
    """One message. Content parts are kept if they are text; other kinds are refused."""

    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: str | list[str | dict[str, Any]] = Field(default_factory=list)
    reasoning_content: str | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] = Field(default_factory=list)
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self, written: Container[str]) -> dict[str, Any]:
        """What the chat template gets: its content is a string or a list of text parts, arguments are objects.

        Args:
            written: the fields beside role and content that the template writes.

        Raises:
            MessageError: a part that is not text, or a field that the template would not show.
        """
        shown: dict[str, Any] = {"role": self.role, "content": self._content()}
        for field in ("reasoning_content", "tool_calls"):
            if getattr(self, field) and field not in written:
                raise MessageError(
                    f"messages has {field}, which this model's chat template does not write; remove them",
                    unsupported=True,
                )
        if self.tool_calls:
            shown["tool_calls"] = [_tool_call(call) for call in self.tool_calls]
        optional = {
            "reasoning_content": self.reasoning_content or None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return shown | {name: value for name, value in optional.items() if value is not None}

    def _content(self) -> str | list[dict[str, str]]:
        if isinstance(self.content, str):
            return self.content
        texts = [part if isinstance(part, str) else _text_of(part) for part in self.content]
        return [text_part(text) for text in texts if text is not None]


def says_something(message: Message) -> bool:
    """Whether a plain message has text, reasoning or calls in it; spaces alone say nothing."""
    thought = str(message.get("reasoning_content", ""))
    return bool(plain(message).strip() or thought.strip() or message.get("tool_calls"))


def fault(error: ValidationError) -> tuple[str, str]:
    """The first field that a model refuses ("" for the whole), and what is wrong with it, beginning with the verb."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    if first["type"] == "missing":
        return path, "is missing; it is required"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if first["type"] == "extra_forbidden":
        return path, f"is {shown}: it is no field that is known here; remove it or set it to null"
    return path, f"is {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _is_branch(part: object) -> bool:
    """pydantic puts the tried type of a union into the path."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def _text_of(part: Mapping[str, Any]) -> str | None:
    """The text of a content part; None where it is null, which vLLM skips, too."""
    kind = part.get("type")
    field = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise MessageError(
            f"messages has a content part of type {kind!r:.80}; only parts of type 'text' are supported, remove it",
            unsupported=True,
            public="messages has a content part of another type than 'text', and only these are supported: remove it",
        )
    text = part.get(field)
    if not isinstance(text, str | None):
        public = f"messages has a content part whose {field} is no string; send one"
        raise MessageError(f"messages has a content part whose {field} is {text!r:.80}; send a string", public=public)
    return text


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """As templates expect it: arguments are an object, not the JSON that OpenAI's API has for it."""
    shown = {"type": call.type, **call.model_dump(exclude_unset=True)}
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            shown["function"]["arguments"] = strict_json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise MessageError(
                f"messages has a call of {call.function.name!r} with arguments {arguments[:80]!r}, which are no JSON "
                f"({error}); send JSON",
                public="messages has a call whose arguments are no JSON; send JSON",
            ) from None
    return shown
