"""JSON that means one thing: Python reads more than that, and some of it silently."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from coserve_agent.unicode import surrogate_in_json


class HalfCharacterError(ValueError):
    """A string holds half of a surrogate pair."""


def loads(text: str) -> Any:
    """The value of `text`.

    Raises:
        HalfCharacterError: JSON, but for half of a surrogate pair.
        ValueError: no JSON; NaN, Infinity or a number beyond float64's range; a field twice in one object, of which
            Python would drop the first.
        RecursionError: nested too deeply.
    """
    value = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_distinct)
    found = surrogate_in_json(text, value)
    if found is not None:
        raise HalfCharacterError(str(found))
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice[:80]!r} stands twice in one object")
    return fields
