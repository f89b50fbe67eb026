"""Parts what a model thought from what it says behind that: `<think>…</think>` at the start of an answer."""

from __future__ import annotations

from dataclasses import dataclass

from coserve_agent.text.detokenize import overlap
from coserve_agent.text.marks import Marks, unmarked
from coserve_agent.tools.events import Thought


@dataclass(frozen=True)
class Tags:
    """Around what a model thinks."""

    opening: str
    closing: str


class ThoughtParser:
    """Of one answer. White space beside the tags is the template's and is left out.

    Args:
        inside: the prompt has opened the block. Without its end all of the answer was thought.
    """

    def __init__(self, tags: Tags, marks: Marks, *, inside: bool) -> None:
        self._opening, self._closing = marks.seen(tags.opening), marks.seen(tags.closing)
        self._inside = inside
        self._begins = True
        """Whether the opening tag may come."""
        self._done = False
        self._pending = ""
        self._thought = False
        """Whether there was a thought; white space behind it is left out."""
        self._said = False

    def feed(self, text: str, *, ended: bool = False) -> tuple[list[Thought], str]:
        """What `text` adds: to what was thought, and behind that."""
        self._pending += text
        thoughts: list[Thought] = []
        if self._begins:
            self._begin(ended)
        if not self._begins and self._inside and not self._done:
            thoughts = self._think(ended)
        if not self._done:
            return thoughts, ""
        rest, self._pending = self._pending, ""
        if self._thought and not self._said:
            rest = rest.lstrip()
        self._said = self._said or bool(rest)
        return thoughts, rest

    def _begin(self, ended: bool) -> None:
        text = self._pending.lstrip()
        if not ended and self._opening.startswith(text):
            return
        self._begins = False
        if text.startswith(self._opening):
            self._inside, self._pending = True, text[len(self._opening) :]
        self._done = not self._inside

    def _think(self, ended: bool) -> list[Thought]:
        text = self._pending if self._thought else self._pending.lstrip()
        thought, found, rest = text.partition(self._closing)
        if found:
            self._done, self._pending = True, rest
        else:
            thought = text[: len(text) - (0 if ended else overlap(text, self._closing))]
        thought = thought.rstrip()
        if not found:
            self._pending = text[len(thought) :]
        said = unmarked(thought)
        self._thought = self._thought or bool(said) or bool(found)
        return [Thought(said)] if said else []
