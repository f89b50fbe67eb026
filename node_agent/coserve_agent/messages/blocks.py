"""What a conversation is made of in the Messages API, and the same as messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from coserve_agent.chat.message import StrictModel
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.shapes import Other, Text, by_shape

Id = Annotated[str, Field(min_length=1, max_length=256)]


class _Block(StrictModel):
    """Prompts are kept for those that begin alike, whether `cache_control` asks for it or not."""

    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    """Citations are for people, not for the model."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


TextBlocks = Annotated[Text | Other[list[TextBlock]], by_shape]


class ToolUse(_Block):
    type: Literal["tool_use"]
    id: Id
    name: Id
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResult(_Block):
    """No chat template writes `is_error`: the content has to say it."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: TextBlocks = ""
    is_error: bool | None = None


class Thinking(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinking(_Block):
    """What another server has encrypted says nothing here."""

    type: Literal["redacted_thinking"]
    data: str


def _kind(value: object) -> str:
    """The block's tag; brackets keep it out of an error's path."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"[{kind:.40}]" if isinstance(kind, str) else "[]"


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ToolUse, Tag("[tool_use]")]
    | Annotated[ToolResult, Tag("[tool_result]")]
    | Annotated[Thinking, Tag("[thinking]")]
    | Annotated[RedactedThinking, Tag("[redacted_thinking]")],
    Discriminator(
        _kind,
        custom_error_type="block",
        custom_error_message="no block of a type that is supported here (those are text, tool_use, tool_result, "
        "thinking and redacted_thinking); remove it",
    ),
]


class Message(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Text | Other[list[Block]], by_shape]


def messages_of(given: Sequence[Message], *, thoughts: bool) -> list[dict[str, Any]]:
    """The messages as a chat has them; what was thought is left out unless the chat template writes `thoughts`.

    Raises:
        ApiError: 400 for a block that a message of its role cannot have, and the result of a call that is not there.
    """
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for n, message in enumerate(given):
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(n, message.content, names, thoughts))
        else:
            messages += _others(n, message.role, message.content, names)
    return messages


def _assistant(n: int, blocks: Sequence[Block], names: dict[str, str], thoughts: bool) -> dict[str, Any]:
    texts: list[dict[str, str]] = []
    calls: list[dict[str, Any]] = []
    thought = ""
    for at, block in enumerate(blocks):
        match block:
            case TextBlock():
                texts.append({"type": "text", "text": block.text})
            case ToolUse():
                names[block.id] = block.name
                calls.append({"id": block.id, "function": {"name": block.name, "arguments": block.input}})
            case Thinking():
                thought += block.thinking
            case ToolResult():
                raise _misplaced(n, at, block, "assistant")
    said: dict[str, Any] = {"role": "assistant", "content": texts}
    more = {"tool_calls": calls, "reasoning_content": thought if thoughts else ""}
    return said | {name: value for name, value in more.items() if value}


def _others(n: int, role: str, blocks: Sequence[Block], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A user's message: what it says, and before, between or behind that the results of calls, each on its own."""
    texts: list[dict[str, str]] = []
    results = 0
    for at, block in enumerate(blocks):
        match block:
            case TextBlock():
                texts.append({"type": "text", "text": block.text})
            case ToolResult() if role == "user":
                if texts:
                    yield {"role": role, "content": texts}
                    texts = []
                results += 1
                yield _result(n, at, block, names)
            case _:
                raise _misplaced(n, at, block, role)
    if texts or not results:
        yield {"role": role, "content": texts}


def _result(n: int, at: int, block: ToolResult, names: dict[str, str]) -> dict[str, Any]:
    if block.tool_use_id not in names:
        raise bad_request(
            f"messages[{n}].content[{at}].tool_use_id is {block.tool_use_id[:80]!r}, and no tool_use before it has "
            "that id; send the call before its result",
            "messages",
            "invalid_value",
        )
    said = {"role": "tool", "tool_call_id": block.tool_use_id, "name": names[block.tool_use_id]}
    return said | {"content": content_of(block.content)}


def content_of(blocks: str | Sequence[TextBlock]) -> str | list[dict[str, str]]:
    """Text as a chat has it."""
    return blocks if isinstance(blocks, str) else [{"type": "text", "text": block.text} for block in blocks]


def _misplaced(n: int, at: int, block: Block, role: str) -> Exception:
    return bad_request(
        f"messages[{n}].content[{at}] is a {block.type}, which a message of role {role!r} cannot have; move it, or "
        "remove it",
        "messages",
        "invalid_value",
    )
