"""Writes an answer as the Messages API does: content blocks, and the events of their growing."""

from __future__ import annotations

from typing import Any

from coserve_agent import strict_json
from coserve_agent.generation.single import Ending, Events, Usage
from coserve_agent.http.errors import ApiError
from coserve_agent.tools.call_id import call_id
from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Event, Said, Thought
from coserve_engine.messages import FinishReason

_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
"""Blocks as they begin. Nothing is signed: a thought that comes back is taken as it is."""


class MessageWriter:
    """Of one message."""

    def __init__(self, name: str, model: str) -> None:
        self._head = {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": model}
        self._blocks: list[dict[str, Any]] = []
        self._open = False
        self._arguments = ""
        self._begun = self._ended = 0
        """Calls, and those of them that are whole."""
        self._ending: dict[str, Any] = {}

    def opening(self, prompt: Usage) -> Events:
        none: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        start = {"type": "message_start", "message": {**self._head, **none, "usage": _usage(prompt)}}
        return [start, {"type": "ping"}]

    def add(self, event: Event) -> Events:
        match event:
            case Thought(text):
                return self._text("thinking", text)
            case Said(text):
                return self._text("text", text)
            case CallBegun(_, name):
                self._begun += 1
                return self._begin({"type": "tool_use", "id": call_id(), "name": name, "input": {}})
            case Arguments(_, text):
                self._arguments += text
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case CallEnded():
                self._ended += 1
                return self._end()

    def ending(self, ending: Ending) -> Events:
        events = self._end()
        reason, stopped = "end_turn", None
        if ending.finish == FinishReason.LENGTH.value:
            reason = "max_tokens"
        elif 0 < self._begun == self._ended:
            reason = "tool_use"
        elif ending.stop_string is not None:
            reason, stopped = "stop_sequence", ending.stop_string
        delta, usage = {"stop_reason": reason, "stop_sequence": stopped}, _usage(ending.usage)
        self._ending = {**delta, "usage": usage}
        return [*events, {"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def whole(self) -> dict[str, Any]:
        return {**self._head, "content": self._blocks, **self._ending}

    def failed(self, error: ApiError) -> Events:
        return [error.anthropic_body()]

    def _text(self, kind: str, text: str) -> Events:
        going_on = self._open and self._blocks[-1]["type"] == kind
        events = [] if going_on else self._begin(dict(_EMPTY[kind]))
        self._blocks[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, block: dict[str, Any]) -> Events:
        before = self._end()
        self._blocks.append(block)
        self._open, self._arguments = True, ""
        return [*before, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _end(self) -> Events:
        if not self._open:
            return []
        self._open, block = False, self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _input(self._arguments)
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; none where they are cut, or mean nothing that could be sent as JSON."""
    try:
        value = strict_json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: `input_tokens` are those that were not computed before."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }
