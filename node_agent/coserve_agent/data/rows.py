"""A line as a row of one of three kinds: a conversation, a prompt with its completion, or a text.

Messages are read by the model that reads a request's (`chat.message`), and may say beside it whether an answer is
learned: `weight` 0 or 1 (OpenAI, Mistral) and `train` true or false (Axolotl).
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError, field_validator

from coserve_agent import strict_json
from coserve_agent.chat.message import ChatMessage, MessageError, fault, says_something
from coserve_agent.data.problems import LineError, Reason, is_name
from coserve_agent.data.rendering import Conversation
from coserve_api.job import Learn

_BOM = b"\xef\xbb\xbf"
Fields = Mapping[str, Any]
"""The fields of a row that are not null."""


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text behind it that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text, all of which is learned."""

    text: str


Row = Conversation | Completion | Text


class RowMessage(ChatMessage):
    """A message of a row."""

    weight: float | None = None
    train: bool | None = None

    @field_validator("weight", mode="before")
    @classmethod
    def _all_or_nothing(cls, value: object) -> object:
        if isinstance(value, bool) or value not in (0, 1):
            raise ValueError("a weight is 0 or 1 here")
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _truth(cls, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value

    @property
    def chosen(self) -> bool:
        """Whether it is to be learned, as far as the message itself says."""
        return self.weight != 0 and self.train is not False


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line, without its fields that are null.

    Raises:
        LineError: it is none.
    """
    try:
        text = raw.removeprefix(_BOM).decode()
        row = strict_json.loads(text)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        raise LineError(Reason.NOT_UTF8, message) from None
    except strict_json.HalfCharacterError as error:
        where = error.name if is_name(error.name) else "a field"
        public = f"{where} holds half of a surrogate pair, which is no character; write whole characters"
        raise LineError(Reason.SURROGATE, str(error), public) from None
    except (ValueError, RecursionError) as error:
        rest = f"each line must be one JSON object{_hint(text)}"
        raise LineError(
            Reason.NOT_JSON, f"is not JSON ({error}); {rest}", f"is not JSON{_place(error)}; {rest}"
        ) from None
    if not isinstance(row, dict):
        message = f"is a JSON {type(row).__name__}; each line must be one JSON object{_hint(text)}"
        raise LineError(Reason.NOT_JSON, message)
    return {name: value for name, value in row.items() if value is not None}


def _hint(text: str) -> str:
    """For files that are one array, as LLaMA-Factory's are."""
    return ": `jq -c '.[]' FILE` writes an array's so" if text.lstrip().startswith("[") else ""


def is_blank(raw: bytes) -> bool:
    return not raw.removeprefix(_BOM).strip()


def text_field(row: Fields, field: str) -> str:
    """The string in `field`. Raises LineError."""
    value = row.get(field)
    if not isinstance(value, str):
        raise wrong(field, value, "it must be a string")
    return value


def list_field(row: Fields, field: str, of: str) -> list[Any]:
    """The list in `field`, not empty; `of` says of what. Raises LineError."""
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise wrong(field, value, f"it must be a list of {of}")
    return value


def read_messages(given: Sequence[Any], field: str) -> list[RowMessage]:
    """The messages in the list `field`. Raises LineError naming message and field."""
    return [_message(one, f"{field}[{n}]") for n, one in enumerate(given)]


def _message(given: Any, where: str) -> RowMessage:
    if not isinstance(given, dict):
        raise wrong(where, given, "it must be an object with role and content")
    try:
        message = RowMessage.model_validate(given)
    except ValidationError as error:
        path, what = fault(error)
        unknown = error.errors(include_url=False)[0]["type"] == "extra_forbidden"
        reason = Reason.UNKNOWN_FIELD if unknown else Reason.FIELD
        field = ".".join(
            [where, *(part if is_name(part) or part.isdigit() else "…" for part in path.split(".") if part)]
        )
        public = f"{field} {_kind_of_fault(error)}"
        raise LineError(reason, f"{where}{path and '.'}{path} {what}", public) from None
    if message.role != "assistant" and "content" not in message.model_fields_set:
        raise LineError(Reason.FIELD, f"{where}.content is missing; it must be a string or a list of text parts")
    if message.role != "assistant" and (message.weight or message.train):
        field = "weight" if message.weight else "train"
        raise LineError(
            Reason.UNSUPPORTED,
            f"{where}.{field} asks to learn a message of role {message.role!r}; only the assistant's are learned here: "
            "remove it",
            f"{where}.{field} asks to learn a message that is not the assistant's; only those are learned: remove it",
        )
    return message


def conversation(
    messages: Sequence[RowMessage],
    *,
    field: str,
    tools: tuple[dict[str, Any], ...],
    written: Container[str],
    learn: Learn,
    prompt: int = 0,
) -> Conversation:
    """A row of messages.

    Args:
        field: the row's field that holds them, for what is said of them.
        written: the fields that the model's chat template writes (`Tokenizer.written_fields`).
        prompt: the first so many messages are a prompt, and not learned.

    Raises:
        LineError: nothing in it is to be learned, an answer is empty, or the template would leave something out.
    """
    if tools and "tools" not in written:
        raise LineError(
            Reason.UNSUPPORTED,
            "tools is given, and the model's chat template does not write tools; remove the field, or use another "
            "template",
        )
    try:
        plain = tuple(message.plain(written) for message in messages)
    except MessageError as error:
        reason = Reason.UNSUPPORTED if error.unsupported else Reason.FIELD
        raise LineError(reason, str(error), error.public) from None
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise LineError(
            Reason.NOTHING_TO_LEARN, f"{field} has no assistant message, so there is nothing to learn; add one"
        )
    asked = [n for n in answers if n >= prompt]
    if learn is Learn.LAST:
        asked = asked[-1:]
    learned = [n for n in asked if messages[n].chosen]
    if not learned:
        raise LineError(
            Reason.NOTHING_TO_LEARN,
            f"{field} has no assistant message that is learned (weight, train, dataset.learn {learn}); let one be",
        )
    for n in learned:
        if not says_something(plain[n]):
            where = f"{field}[{n}]" if not prompt else f"completion[{n - prompt}]"
            raise LineError(
                Reason.EMPTY_ANSWER, f"{where} is an empty answer, so there is nothing to learn; give it content"
            )
    return Conversation(plain, tools, None if learned == answers else frozenset(learned))


def wrong(where: str, value: object, remedy: str) -> LineError:
    """That the field at `where` has a value which it cannot have."""
    return LineError(Reason.FIELD, f"{where} is {show(value)}; {remedy}", f"{where} is {kind_of(value)}; {remedy}")


def kind_of(value: object) -> str:
    """Of which kind a value is, and nothing of it."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    name = "string" if isinstance(value, str) else "list" if isinstance(value, list) else "object"
    return f"an empty {name}" if not value else f"{'an' if name == 'object' else 'a'} {name}"


def _kind_of_fault(error: ValidationError) -> str:
    """What a model says of the first field that it refuses, and nothing of its value."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "missing":
        return "is missing; it is required"
    if first["type"] == "extra_forbidden":
        return "is no field that is known here; remove it or set it to null"
    return f"cannot be used: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _place(error: Exception) -> str:
    """Where JSON ends to be JSON."""
    return f" ({error.msg} at character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""


def show(value: object) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
