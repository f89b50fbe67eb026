"""Writes an answer as the Responses API does: items, and the events of their growing."""

from __future__ import annotations

from typing import Any

from coserve_agent.generation.single import Ending, Usage
from coserve_agent.http.errors import ApiError
from coserve_agent.responses.body import Body
from coserve_agent.responses.output import CallItem, Events, TextItem
from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Event, Said, Thought
from coserve_engine.messages import FinishReason


class ResponseWriter:
    """Of one response."""

    def __init__(self, body: Body, *, timed: bool) -> None:
        self._body, self._timed = body, timed
        self._output: list[dict[str, Any]] = []
        self._open: TextItem | CallItem | None = None
        self._count = 0
        self._whole: dict[str, Any] = {}

    def opening(self, prompt: Usage) -> Events:
        begun = self._body.written("in_progress", [])
        return [self._numbered({"type": f"response.{one}", "response": begun}) for one in ("created", "in_progress")]

    def add(self, event: Event) -> Events:
        match event:
            case Thought(text):
                return self._text("reasoning", text)
            case Said(text):
                return self._text("message", text)
            case CallBegun(_, name):
                return self._begin(CallItem(name))
            case Arguments(_, text):
                return self._of_item(self._open.add(text) if self._open else [])
            case CallEnded():
                return self._end("completed")

    def ending(self, ending: Ending) -> Events:
        cut = ending.finish == FinishReason.LENGTH.value
        events = []
        if self._open is None and not self._output:
            events += self._begin(TextItem("message"))  # an empty answer is a message, too
        whole = not cut and not isinstance(self._open, CallItem)
        events += self._end("completed" if whole else "incomplete")
        status = "incomplete" if cut else "completed"
        why = "max_output_tokens" if cut else None
        self._whole = self._body.written(status, self._output, ending.usage, incomplete=why)
        if self._timed:
            self._whole["metrics"] = ending.timing()
        return [*events, self._numbered({"type": f"response.{status}", "response": self._whole})]

    def whole(self) -> dict[str, Any]:
        return self._whole

    def failed(self, error: ApiError) -> Events:
        response = self._body.written("failed", self._output, error=error)
        return [self._numbered({"type": "response.failed", "response": response})]

    def _text(self, kind: str, text: str) -> Events:
        events = [] if self._open is not None and self._open.kind == kind else self._begin(TextItem(kind))
        return [*events, *self._of_item(self._open.add(text) if self._open else [])]

    def _begin(self, item: TextItem | CallItem) -> Events:
        before = self._end("completed")
        self._open = item
        added = {"type": "response.output_item.added", "output_index": len(self._output)}
        return [*before, self._numbered(added | {"item": item.item("in_progress")}), *self._of_item(item.begin())]

    def _end(self, status: str) -> Events:
        if self._open is None:
            return []
        events, item = self._of_item(self._open.end()), self._open.item(status)
        done = {"type": "response.output_item.done", "output_index": len(self._output), "item": item}
        self._output.append(item)
        self._open = None
        return [*events, self._numbered(done)]

    def _of_item(self, events: Events) -> Events:
        where = {"item_id": self._open.id if self._open else "", "output_index": len(self._output)}
        return [self._numbered(event | where) for event in events]

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        return {**event, "sequence_number": self._count - 1}
