"""JSON as RFC 8259 has it, read while it grows, without its values: where one ends, and that it is one."""

from __future__ import annotations

import json
import re

from coserve_agent.text.marks import unmarked
from coserve_agent.tools.reader import Malformed, Reader, Steps

MOST_DEPTH = 128
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_VALUE = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null", re.ASCII)
_HEX = re.compile(r"[0-9a-fA-F]")


def value(reader: Reader, depth: int = 0) -> Steps[None]:
    """Past a value, at which `reader` stands. Raises Malformed."""
    first = yield from reader.peek()
    if first == '"':
        yield from string(reader)
    elif first == "{":
        yield from object_(reader, depth)
    elif first == "[":
        yield from _array(reader, depth)
    elif not _VALUE.fullmatch((yield from reader.word(_SCALAR))):
        raise Malformed


def object_(reader: Reader, depth: int = 0) -> Steps[None]:
    """Past an object."""
    more = yield from _opened(reader, "{", "}", depth)
    while more:
        yield from key(reader)
        yield from value(reader, depth + 1)
        more = yield from another(reader, "}")


def key(reader: Reader) -> Steps[str]:
    """The name of a member; past the colon behind it, and white space."""
    name = yield from string(reader)
    yield from reader.blank()
    yield from reader.take(":")
    yield from reader.blank()
    return name


def string(reader: Reader) -> Steps[str]:
    """What a string says. Marks in it stand for no text."""
    start = reader.at
    yield from reader.take('"')
    while (letter := (yield from reader.peek())) != '"':
        if plain := _PLAIN.match(reader.text, reader.at):
            reader.at = plain.end()
        elif letter == "\\":
            yield from _escape(reader)
        else:
            raise Malformed
    reader.at += 1
    said: str = json.loads(unmarked(reader.text[start : reader.at]))
    return said


def _escape(reader: Reader) -> Steps[None]:
    yield from reader.take("\\")
    letter = yield from reader.peek()
    if not letter or letter not in '"\\/bfnrtu':
        raise Malformed
    reader.at += 1
    for _ in range(4 if letter == "u" else 0):
        if not _HEX.match((yield from reader.peek())):
            raise Malformed
        reader.at += 1


def _array(reader: Reader, depth: int) -> Steps[None]:
    more = yield from _opened(reader, "[", "]", depth)
    while more:
        yield from value(reader, depth + 1)
        more = yield from another(reader, "]")


def _opened(reader: Reader, opening: str, closing: str, depth: int) -> Steps[bool]:
    """Past the opening, and the closing where nothing is between; whether something is."""
    if depth > MOST_DEPTH:
        raise Malformed
    yield from reader.take(opening)
    yield from reader.blank()
    return not (yield from reader.follows(closing))


def another(reader: Reader, closing: str) -> Steps[bool]:
    """Past the comma behind a value, or `closing`; whether it was the comma."""
    yield from reader.blank()
    if (yield from reader.follows(closing)):
        return False
    yield from reader.take(",")
    yield from reader.blank()
    return True
