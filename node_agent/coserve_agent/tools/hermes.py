"""Hermes' form, that of Qwen 2.5 and 3, too: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` for each call."""

from __future__ import annotations

from coserve_agent.text.marks import Marks
from coserve_agent.tools.call_object import call_object, head
from coserve_agent.tools.format import Marker, Schema, Written
from coserve_agent.tools.reader import Reader, Steps

BEGIN, END = "<tool_call>", "</tool_call>"
MARKERS = (BEGIN, END)


class Hermes:
    bare = False

    def __init__(self, marks: Marks) -> None:
        self.markers = (marks.seen(BEGIN),)
        self._end = marks.seen(END)

    def read(self, reader: Reader) -> Steps[None]:
        yield from reader.blank()
        yield from call_object(reader)
        yield from reader.blank()
        if (yield from reader.peek()):  # at the end of an answer it may be missing
            yield from reader.take(self._end)

    def written(self, name: str) -> Written:
        return Written((Marker(BEGIN), "\n" + head(name, "arguments"), Schema(), "}\n", Marker(END)), between=("\n",))
