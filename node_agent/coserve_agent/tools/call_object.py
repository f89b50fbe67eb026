"""A call as a JSON object, `{"name": …, "arguments": {…}}`, as most formats have it."""

from __future__ import annotations

import json

from coserve_agent.text.marks import unmarked
from coserve_agent.tools.json_text import another, key, object_, string, value
from coserve_agent.tools.reader import Malformed, Reader, Steps

_ARGUMENTS = ("arguments", "parameters")
"""Models write the one for the other."""
_MORE = ("id", "type")
"""Members that some templates show beside them, and models copy: they say nothing."""
NONE = "{}"


def head(name: str, arguments: str) -> str:
    """A call of the function `name` up to its arguments, which are the member `arguments`."""
    return f'{{"name": {json.dumps(name)}, "{arguments}": '


def call_object(reader: Reader) -> Steps[None]:
    """Past a call, whose arguments are handed out as they come where its name stands before them.

    Raises:
        Malformed: it is no JSON object, has no name, two of a kind, or more than a call has.
    """
    name: str | None = None
    arguments: str | None = None
    seen = set[str]()
    begun = False
    yield from reader.take("{")
    yield from reader.blank()
    more = True
    while more:
        member = yield from key(reader)
        kind = _ARGUMENTS[0] if member in _ARGUMENTS else member
        if kind in seen:
            raise Malformed
        seen.add(kind)
        first, start = (yield from reader.peek()), reader.at
        if kind == "name":
            name = yield from string(reader)
        elif kind == _ARGUMENTS[0] and first == "{" and name is not None:
            reader.begin(name)
            yield from object_(reader)
            reader.finish()
            begun = True
        elif kind == _ARGUMENTS[0]:
            arguments = yield from _arguments(reader, start)
        elif kind in _MORE:
            yield from value(reader)
        else:
            raise Malformed
        more = yield from another(reader, "}")
    if name is None:
        raise Malformed
    if not begun:
        reader.call(name, NONE if arguments is None else arguments)


def _arguments(reader: Reader, start: int) -> Steps[str]:
    """Arguments that stand before the name, or are no object: as JSON in a string, or null."""
    first = yield from reader.peek()
    if first == '"':
        said = yield from string(reader)
        inner = Reader(said)
        inner.ended = True
        yield from inner.blank()
        yield from object_(inner)
        yield from inner.blank()
        if inner.at < len(said) or unmarked(said) != said:
            raise Malformed
        return said
    yield from value(reader)
    found = unmarked(reader.text[start : reader.at])
    if first == "{":
        return found
    if json.loads(found) is not None:
        raise Malformed
    return NONE
