"""How a chat template takes a message in which the assistant calls tools and says nothing: some want its content empty,
some null, and some the arguments as JSON text. Templates do not say; a call is rendered and looked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from coserve_agent.chat.format import USER, Render, shaped, tried
from coserve_agent.chat.template import Message

_NAME, _ARGUMENT = "quokka", "wombat"


@dataclass(frozen=True)
class CallFormat:
    """`nothing` stands for the content of a message that only calls; `as_text` if arguments are JSON text."""

    nothing: str | None = ""
    as_text: bool = False

    def shaped(self, message: Message) -> dict[str, Any]:
        """`message` as the template takes it."""
        calls = message.get("tool_calls")
        if not calls:
            return dict(message)
        shown = {**message, "content": message.get("content") or self.nothing}
        return {**shown, "tool_calls": [self._call(call) for call in calls]} if self.as_text else shown

    def _call(self, call: Message) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def call_format(render: Render, in_parts: frozenset[str]) -> CallFormat | None:
    """The first form of which the template writes name and argument, or at least the name; None where it writes
    neither.
    """
    function = {"name": _NAME, "arguments": {"x": _ARGUMENT}}
    call = {"type": "function", "id": "a1b2c3d4e", "function": function}
    user = shaped(USER, in_parts)
    calls = shaped({"role": "assistant", "content": "", "tool_calls": [call]}, in_parts)
    forms = [CallFormat(nothing, as_text) for as_text in (False, True) for nothing in ("", None)]
    texts = [(form, text) for form in forms if _NAME in (text := tried(render, [user, form.shaped(calls)]))]
    whole = (form for form, text in texts if _ARGUMENT in text)
    return next(whole, texts[0][0] if texts else None)
