"""Mistral's forms: an array behind a marker, `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and since 2025 each call
behind one, `[TOOL_CALLS]name[ARGS]{…}`. Both are read; which one is asked for, the tokenizer says.
"""

from __future__ import annotations

import re

from coserve_agent.text.marks import Marks
from coserve_agent.tools.call_object import call_object, head
from coserve_agent.tools.format import Marker, Schema, Written
from coserve_agent.tools.json_text import another, object_
from coserve_agent.tools.reader import Reader, Steps

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MARKERS = (CALLS, ARGS, ID)
_WORD = re.compile(r"[A-Za-z0-9_.-]+")


class Mistral:
    """`named`: it is asked for the newer form."""

    bare = False

    def __init__(self, marks: Marks, *, named: bool) -> None:
        self.markers = (marks.seen(CALLS),)
        self._args, self._id = marks.seen(ARGS), marks.seen(ID)
        self._named = named

    def read(self, reader: Reader) -> Steps[None]:
        yield from reader.blank()
        if (yield from reader.peek()) == "[":
            yield from self._array(reader)
        else:
            yield from self._call(reader)

    def _array(self, reader: Reader) -> Steps[None]:
        yield from reader.take("[")
        yield from reader.blank()
        more = True
        while more:
            yield from call_object(reader)
            more = yield from another(reader, "]")

    def _call(self, reader: Reader) -> Steps[None]:
        name = yield from reader.word(_WORD)
        if (yield from reader.follows(self._id)):  # some templates show it, and models copy it
            yield from reader.word(_WORD)
        yield from reader.follows(self._args)  # Devstral leaves it out
        yield from reader.blank()
        reader.begin(name)
        yield from object_(reader)
        reader.finish()

    def written(self, name: str) -> Written:
        if self._named:
            return Written((Marker(CALLS), name, Marker(ARGS), Schema()), between=())
        return Written((head(name, "arguments"), Schema(), "}"), (Marker(CALLS), "["), (", ",), ("]",))
