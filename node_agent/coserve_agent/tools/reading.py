"""How one answer is read: its text gives what was thought, content, and calls."""

from __future__ import annotations

from dataclasses import dataclass

from coserve_agent.text.marks import NO_MARKS, Marks, unmarked
from coserve_agent.tools.call_parser import CallParser
from coserve_agent.tools.events import Event, Said
from coserve_agent.tools.format import Format
from coserve_agent.tools.thought_parser import Tags, ThoughtParser


@dataclass(frozen=True)
class Reading:
    """What to look for in an answer.

    Args:
        marks: the special tokens that its text shows as marks.
        format: how calls are written; None: there are none.
        names: of the tools.
        held: a grammar holds the answer to calls.
        most_calls: how many are wanted; None: any number.
        tags: around what the model thinks; None: it does not.
        thinking: the prompt has opened the block.
    """

    marks: Marks = NO_MARKS
    format: Format | None = None
    names: frozenset[str] = frozenset()
    held: bool = False
    most_calls: int | None = None
    tags: Tags | None = None
    thinking: bool = False

    @property
    def plain(self) -> bool:
        """Whether all of it is content."""
        return self.format is None and self.tags is None


PLAIN = Reading()


class AnswerParser:
    """Of one answer, piece by piece."""

    def __init__(self, reading: Reading) -> None:
        marks, tags = reading.marks, reading.tags
        self._thoughts = None if tags is None else ThoughtParser(tags, marks, inside=reading.thinking)
        self._calls = (
            None
            if reading.format is None
            else CallParser(reading.format, reading.names, held=reading.held, most=reading.most_calls)
        )

    def read(self, text: str, *, ended: bool) -> list[Event]:
        """What `text` adds; what was held back, too, where the answer has `ended`."""
        events: list[Event] = []
        if self._thoughts is not None:
            thoughts, text = self._thoughts.feed(text, ended=ended)
            events += thoughts
        if self._calls is None:
            return [*events, Said(said)] if (said := unmarked(text)) else events
        events += self._calls.feed(text)
        return events + self._calls.end() if ended else events
