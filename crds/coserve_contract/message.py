"""What every message is: JSON with a version, and an error that names key, field, value and remedy where it is not."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from coserve_api.errors import MessageError

T = TypeVar("T")
MESSAGE_BYTES = 128 << 10
"""A message is at most so long."""
_FOREIGN = "the writer is broken or foreign: delete the key, and its writer writes it anew"
_SHOWN = 120


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(Part):
    """A whole message: what one key or hash field holds."""

    version: Literal[1] = 1

    def dumps(self) -> str:
        """The message as it is stored."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def loads(cls, key: str, raw: bytes | str) -> Self:
        """Parse what was found under `key`; MessageError names key, field, value and remedy."""
        try:
            return cls.model_validate(parsed(key, raw))
        except ValidationError as error:
            raise message_error(key, error) from None


def loaded(
    load: Callable[[str, bytes], T], rows: Iterable[tuple[str, str, bytes]]
) -> tuple[dict[str, T], tuple[MessageError, ...]]:
    """What each of the rows (name, key, message) holds, by name, and the faults of those that do not read."""
    found, broken = {}, []
    for name, key, raw in rows:
        try:
            found[name] = load(key, raw)
        except MessageError as error:
            broken.append(error)
    return found, tuple(broken)


def parsed(key: str, raw: bytes | str) -> Any:
    """What is to be validated. By itself: each fault of a text that is validated at once holds a copy of what it is
    about, and large rubbish takes seconds.
    """
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MessageError(key, "", _shown(raw), f"{error}; {_FOREIGN}") from None


def _shown(value: Any) -> str:
    """A value in at most _SHOWN characters."""
    try:
        shown = repr(value[:_SHOWN]) if isinstance(value, (str, bytes)) else reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def message_error(key: str, error: ValidationError) -> MessageError:
    """The first fault of a message as the typed error."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    value = _shown(first["input"])
    if field == "version" or field.endswith(".version"):
        remedy = "this program reads version 1; update it, or wait until the rolling update is through"
    else:
        remedy = f"{first['msg']}; {_FOREIGN}"
    return MessageError(key, field, value, remedy)
