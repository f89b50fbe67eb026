"""The items of an answer while they grow: what was thought, a message, a call. Each has its own events, in the order in
which OpenAI's API sends them: added, its parts, its deltas, done.
"""

from __future__ import annotations

import uuid
from typing import Any

from coserve_agent.tools.call_id import call_id

Events = list[dict[str, Any]]
"""They lack what is said of each: where its item stands, and its number."""


class TextItem:
    """One with a single part of text: a message, or what was thought."""

    def __init__(self, kind: str) -> None:
        self.kind, self._text = kind, ""
        message = kind == "message"
        self.id = f"{'msg' if message else 'rs'}_{uuid.uuid4().hex}"
        self._part_type = "output_text" if message else "reasoning_text"
        self._more: dict[str, Any] = {"annotations": [], "logprobs": []} if message else {}
        self._logprobs: dict[str, Any] = {"logprobs": []} if message else {}

    def item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        head = {"id": self.id, "type": self.kind, "status": status}
        more: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return {**head, **more, "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": self._part_type, "text": self._text, **self._more}

    def begin(self) -> Events:
        return [{"type": "response.content_part.added", "content_index": 0, "part": self._part()}]

    def add(self, text: str) -> Events:
        self._text += text
        return [{"type": f"response.{self._part_type}.delta", "content_index": 0, "delta": text, **self._logprobs}]

    def end(self) -> Events:
        return [
            {"type": f"response.{self._part_type}.done", "content_index": 0, "text": self._text, **self._logprobs},
            {"type": "response.content_part.done", "content_index": 0, "part": self._part()},
        ]


class CallItem:
    """A call of a function."""

    kind = "function_call"

    def __init__(self, name: str) -> None:
        self._name, self._arguments = name, ""
        self.id, self._call_id = f"fc_{uuid.uuid4().hex}", call_id()

    def item(self, status: str) -> dict[str, Any]:
        called = {"call_id": self._call_id, "name": self._name, "arguments": self._arguments}
        return {"id": self.id, "type": self.kind, "status": status, **called}

    def begin(self) -> Events:
        return []

    def add(self, text: str) -> Events:
        self._arguments += text
        return [{"type": "response.function_call_arguments.delta", "delta": text}]

    def end(self) -> Events:
        done = {"name": self._name, "arguments": self._arguments}
        return [{"type": "response.function_call_arguments.done", **done}]
