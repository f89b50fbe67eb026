"""An answer's message in a chat, whole and in deltas: what was thought, content, and calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coserve_agent.tools.call_id import call_id
from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Event, Said, Thought
from coserve_agent.tools.reading import AnswerParser, Reading


class Message:
    """Of one choice."""

    def __init__(self, reading: Reading) -> None:
        self._parser = AnswerParser(reading)
        self._begun = self._ended = 0

    @property
    def calls(self) -> bool:
        """Whether it has calls, all of them whole."""
        return 0 < self._begun == self._ended

    def deltas(self, text: str, *, ended: bool) -> list[dict[str, Any]]:
        """What the next part of its text adds, one for each kind of thing."""
        return [delta for event in self._read(text, ended=ended) if (delta := _delta(event)) is not None]

    def whole(self, text: str) -> dict[str, Any]:
        """All of it, whose text this is."""
        events = self._read(text, ended=True)
        said = "".join(one.text for one in events if isinstance(one, Said))
        thought = "".join(one.text for one in events if isinstance(one, Thought))
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, CallBegun):
                calls[event.index] = _call(event.name)
            elif isinstance(event, Arguments):
                calls[event.index]["function"]["arguments"] += event.text
        message = {"role": "assistant", "content": said or (None if calls or thought else ""), "refusal": None}
        more = {"reasoning_content": thought, "tool_calls": list(calls.values())}
        return message | {name: value for name, value in more.items() if value}

    def _read(self, text: str, *, ended: bool) -> list[Event]:
        events = self._parser.read(text, ended=ended)
        self._begun += _count(events, CallBegun)
        self._ended += _count(events, CallEnded)
        return events


def _count(events: Iterable[Event], kind: type[Event]) -> int:
    return sum(isinstance(one, kind) for one in events)


def _delta(event: Event) -> dict[str, Any] | None:
    match event:
        case Said(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallBegun(index, name):
            return {"tool_calls": [{"index": index, **_call(name)}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None


def _call(name: str) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
