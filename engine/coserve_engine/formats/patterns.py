"""Regular expressions that strangers wrote, matched in time that grows with pattern and text: Python's own matcher goes
back and tries again, for as long as the pattern likes.

A pattern is parsed as Python does and followed with all places at once (Thompson, 1968), for the operators that need no
memory of the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_CHARS = 512
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    ops.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    ops.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


class PatternError(ValueError):
    """No regular expression, or one that cannot be matched in bounded time."""


@lru_cache(maxsize=4096)
def parsed(pattern: str) -> Sequence[Any]:
    """The operators of `pattern`.

    Raises:
        PatternError: it is too long, is no regular expression, or has an operator that is not followed here.
    """
    if len(pattern) > MOST_CHARS:
        raise PatternError(f"it is longer than {MOST_CHARS} characters")
    try:
        found: Sequence[Any] = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(str(error)) from None
    if found.state.flags & ~re.UNICODE:  # type: ignore[attr-defined]
        raise PatternError("it has flags")
    _ends(found, "", frozenset())
    return found


def matches(pattern: str, text: str) -> bool:
    """Whether all of `text`, which has no line ends, is one that `pattern` describes; PatternError as of `parsed`."""
    return len(text) in _ends(parsed(pattern), text, frozenset((0,)))


def _ends(items: Sequence[Any], text: str, at: frozenset[int]) -> frozenset[int]:
    """Where a match of `items` can end that begins at one of the places `at`."""
    for op, value in items:
        at = _step(op, value, text, at)
    return at


def _step(op: Any, value: Any, text: str, at: frozenset[int]) -> frozenset[int]:
    if op is ops.SUBPATTERN:
        _, added, taken, inside = value
        if added or taken:
            raise PatternError("it has flags")
        return _ends(inside, text, at)
    if op is ops.BRANCH:
        return frozenset().union(*(_ends(each, text, at) for each in value[1]))
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        least, most, inside = value
        return _repeat(least, most, inside, text, at)
    if op is ops.AT:
        if value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return at & {0}
        if value in (ops.AT_END, ops.AT_END_STRING):
            return at & {len(text)}
        raise PatternError(f"it has {value}, which is not supported")
    fits = _fits(op, value)
    return frozenset(place + 1 for place in at if place < len(text) and fits(text[place]))


def _repeat(least: int, most: int, inside: Sequence[Any], text: str, at: frozenset[int]) -> frozenset[int]:
    """After a round for each character, and one, no place is left, or, where a round may be empty, none comes anew."""
    found, rounds = at if least == 0 else frozenset[int](), min(int(most), len(text) + 1)
    for number in range(1, rounds + 1):
        at = _ends(inside, text, at)
        if number >= least:
            found |= at
    return found | at if least > rounds else found


def _fits(op: Any, value: Any) -> Callable[[str], bool]:
    if op is ops.LITERAL:
        return lambda char: char == chr(value)
    if op is ops.NOT_LITERAL:
        return lambda char: char != chr(value)
    if op is ops.ANY:
        return lambda char: char != "\n"
    if op is ops.IN:
        negated = bool(value) and value[0][0] is ops.NEGATE
        parts = [_fits(*part) for part in (value[1:] if negated else value)]
        return lambda char: any(part(char) for part in parts) is not negated
    if op is ops.RANGE:
        low, high = value
        return lambda char: low <= ord(char) <= high
    if op is ops.CATEGORY:
        return _CATEGORIES[value]
    raise PatternError(f"it has {op}, which is not supported")
