"""Llama 3's form: a JSON object `{"name": …, "parameters": {…}}` is all that the model says, or stands behind
`<|python_tag|>`. Several are separated by semicolons or lines, though its templates write one alone.

Without a marker an answer that is JSON may be no call: its name must be that of a tool.
"""

from __future__ import annotations

from coserve_agent.text.marks import Marks
from coserve_agent.tools.call_object import call_object, head
from coserve_agent.tools.format import Schema, Written
from coserve_agent.tools.reader import Reader, Steps

TAG = "<|python_tag|>"
MARKERS = (TAG,)


class Llama:
    bare = True

    def __init__(self, marks: Marks) -> None:
        self.markers = (marks.seen(TAG),)

    def read(self, reader: Reader) -> Steps[None]:
        yield from reader.blank()
        yield from call_object(reader)

    def written(self, name: str) -> Written:
        return Written((head(name, "parameters"), Schema(), "}"), between=None)
