"""JSON that means one thing: Python reads more than that, and some of it silently."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coserve_agent.text.unicode import surrogate_in_json, values_in_json


class FieldError(ValueError):
    """A field cannot be used; `name` is its own (that of a field that is there twice), or that of the field at the top
    in which the fault is.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name[:200].encode("utf-8", "backslashreplace").decode()  # it can be sent


class HalfCharacterError(FieldError):
    """A string holds half of a surrogate pair."""


def whole(value: float) -> float:
    """JSON has one kind of number: 16.0 is 16."""
    return int(value) if value.is_integer() else value


def loads(text: str, number: Callable[[float], float] = float) -> Any:
    """The value of `text`, numbers with a point or exponent as `number` makes them.

    Raises:
        HalfCharacterError: JSON, but for half of a surrogate pair.
        FieldError: NaN, Infinity or a number beyond float64's range; a field twice in one object, of which Python
            would drop the first.
        ValueError: no JSON.
        RecursionError: nested too deeply.
    """
    wrong: list[_NoNumber] = []

    def constant(text: str) -> _NoNumber:
        wrong.append(_NoNumber(f"{text} is no number of JSON: write null, or a number"))
        return wrong[-1]

    def real(text: str) -> float | _NoNumber:
        value = float(text)
        if math.isfinite(value):
            return number(value)
        wrong.append(_NoNumber(f"{text[:40]} is beyond the range of numbers: write a smaller one"))
        return wrong[-1]

    value = json.loads(text, parse_constant=constant, parse_float=real, object_pairs_hook=_distinct)
    if wrong:
        path = next(tuple(map(str, path)) for path, found in values_in_json(value) if found is wrong[0])
        where = f"{'.'.join(path)[:200]}: " if path else ""
        raise FieldError(path[0] if path else "", where + wrong[0].what)
    found = surrogate_in_json(text, value)
    if found is not None:
        raise HalfCharacterError(found.path[0] if found.path else "", str(found))
    return value


@dataclass(frozen=True, eq=False)
class _NoNumber:
    """Stands where JSON has no number, until it is known which field that is."""

    what: str


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise FieldError(twice, f"field {twice[:80]!r} stands twice in one object: write it once")
    return fields
