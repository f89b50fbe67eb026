"""What a conversation is made of in the Responses API, and the same as messages of a chat.

A turn of the assistant's is several items there (what it thought, what it said, each call) and one message here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from coserve_agent.chat.message import StrictModel
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.shapes import Other, Text, by_shape

MOST_ITEMS = 4096
_KNOWN = ("message", "function_call", "function_call_output", "reasoning")

Id = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Parts = list[dict[str, Any]]
Content = Annotated[Text | Other[Parts], by_shape]


class _Item(StrictModel):
    """`id` and `status` are those of an answer that is sent back."""

    id: Annotated[str, Field(max_length=256)] | None = None
    status: Status | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: Id
    name: Id
    arguments: str


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: Id
    output: Content


class ReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class Reasoning(_Item):
    """A summary, and what another server has encrypted, say nothing here."""

    type: Literal["reasoning"]
    content: list[ReasoningText] = Field(default_factory=list)
    summary: list[Any] = Field(default_factory=list)
    encrypted_content: str | None = None


def _kind(value: object) -> str:
    """The item's tag; brackets keep it out of an error's path."""
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"[{kind:.40}]" if isinstance(kind, str) else "[]"


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCall, Tag("[function_call]")]
    | Annotated[FunctionCallOutput, Tag("[function_call_output]")]
    | Annotated[Reasoning, Tag("[reasoning]")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message=f"no item of a type that is supported here (those are {', '.join(_KNOWN)}); remove it",
    ),
]


def messages_of(items: Sequence[Item], *, thoughts: bool) -> list[dict[str, Any]]:
    """The items as messages; what was thought is left out unless the chat template writes `thoughts`.

    Raises:
        ApiError: 400 for the output of a call that is not there.
    """
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None
    """The assistant's message that items are still added to; it is the last of `messages`."""
    names: dict[str, str] = {}

    def turn_without(*fields: str) -> dict[str, Any]:
        """The turn if it has none of these yet, else a new one."""
        nonlocal turn
        if turn is None or any(turn.get(field) for field in fields):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        return turn

    for n, item in enumerate(items):
        match item:
            case Reasoning():
                said = "".join(part.text for part in item.content)
                if thoughts and said:
                    turn_without("content", "tool_calls", "reasoning_content")["reasoning_content"] = said
            case MessageItem(role="assistant"):
                turn_without("content")["content"] = item.content
            case FunctionCall():
                names[item.call_id] = item.name
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                turn_without().setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                turn = None
                if item.call_id not in names:
                    raise bad_request(
                        f"input[{n}].call_id is {item.call_id[:80]!r}, and no function_call before it has that id; "
                        "send the call before its output",
                        "input",
                        "invalid_value",
                    )
                result = {"role": "tool", "tool_call_id": item.call_id, "name": names[item.call_id]}
                messages.append(result | {"content": item.output})
            case MessageItem():
                turn = None
                messages.append({"role": item.role, "content": item.content})
    return messages
