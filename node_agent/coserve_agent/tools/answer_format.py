"""How a model writes calls and thoughts, found out when the agent starts: templates do not say, so a call and a thought
are rendered, and the format is the one whose parser reads what the template wrote.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from coserve_agent.chat.format import USER, tried
from coserve_agent.chat.template import ChatTemplateError, Given, Message
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.turns import answer, block_tags, opened
from coserve_agent.text.marks import NO_MARKS, Marks
from coserve_agent.tools.call_parser import CallParser
from coserve_agent.tools.events import Arguments, CallBegun
from coserve_agent.tools.format import Format
from coserve_agent.tools.formats import MARKERS, NAMES, format_of
from coserve_agent.tools.thought_parser import Tags
from coserve_api.endpoint import ToolCallParser

_NAME, _ARGUMENTS = "quokka", {"x": "wombat"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "a1b2c3d4e", "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}
_THOUGHT: Message = {"role": "assistant", "content": "wombat", "reasoning_content": _NAME}
_TAGS = re.compile(rf"(<(?:\w+:)?think\w*>|\[THINK\])\s*{_NAME}\s*(</(?:\w+:)?think\w*>|\[/THINK\])", re.IGNORECASE)
_USUAL = Tags("<think>", "</think>")


@dataclass(frozen=True)
class AnswerFormat:
    """Of one model.

    Args:
        shows_tools: whether its chat template writes the tools that there are.
        calls: how calls are written, by name; None: in no way that is known here.
        tags: around what it thinks; None: it does not think, or in the prompt alone.
    """

    shows_tools: bool
    calls: ToolCallParser | None
    tags: Tags | None
    marks: Marks
    format: Format | None

    def __str__(self) -> str:
        tools = "shows tools" if self.shows_tools else "shows no tools"
        calls = "in no form that is known here" if self.calls is None else f"as {self.calls}"
        thinks = "" if self.tags is None else f"; what is thought stands in {self.tags.opening}"
        return f"the chat template {tools}; calls are read {calls}{thinks}"


def answer_format(tokenizer: Tokenizer, named: ToolCallParser | None = None) -> AnswerFormat:
    """That of the model whose tokenizer and template these are; its calls are written as `named`, if that is given."""
    tags = _tags(tokenizer)
    special = tokenizer.pieces.special
    around = (tags, _USUAL) if tags else (_USUAL,)  # a variable may let it think that does not without
    marks = Marks((*MARKERS, *(tag for one in around for tag in (one.opening, one.closing))), special)
    calls = named or _calls(tokenizer)
    form = None if calls is None else format_of(calls, marks, tokenizer.pieces)
    return AnswerFormat(_shows_tools(tokenizer), calls, tags, marks, form)


def _shows_tools(tokenizer: Tokenizer) -> bool:
    render = partial(tokenizer.render, given=Given(tools=[_TOOL]), add_generation_prompt=True)
    system = {**USER, "role": "system"}
    return any(_NAME in tried(render, conversation) for conversation in ([USER], [system, USER]))


def _calls(tokenizer: Tokenizer) -> ToolCallParser | None:
    render = partial(tokenizer.render, given=Given(tools=[_TOOL]))
    try:
        written = answer(render, [USER], _CALL, render([USER], add_generation_prompt=True), "")
    except ChatTemplateError:
        return None
    return next((name for name in NAMES if _reads(name, tokenizer, written)), None)


def _reads(name: ToolCallParser, tokenizer: Tokenizer, written: str) -> bool:
    parser = CallParser(format_of(name, NO_MARKS, tokenizer.pieces), (_NAME,))
    events = parser.feed(written) + parser.end()
    found = [one for one in events if isinstance(one, CallBegun | Arguments)]
    match found:
        case [CallBegun(name=called), Arguments(text=text)]:
            return called == _NAME and bool(json.loads(text) == _ARGUMENTS)
    return False


def _tags(tokenizer: Tokenizer) -> Tags | None:
    asked = partial(tokenizer.render, add_generation_prompt=True)
    block = opened(tried(asked, [USER]))
    if block is not None:
        return Tags(*block_tags(block))
    found = _TAGS.search(tried(partial(tokenizer.render, add_generation_prompt=False), [USER, _THOUGHT]))
    return None if found is None else Tags(found[1], found[2])
