"""What an assistant's message adds to a conversation, as the chat template writes it: the message's own parts (what it
thought, its content, its calls) and the end of the turn.

The text that the template puts between the prompt and the parts (an empty think block, a channel's header, a space) is
nobody's answer: the server's prompt ends before it. Where the prompt opens a think block, the answer begins with what
it thought, or with the block's end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from coserve_agent.chat.format import plain
from coserve_agent.chat.template import ChatTemplateError, Message

_WORD = "quokka"
"""Rendered in the place of a content, to see what stands around it."""
_BLOCK = re.compile(r"\s*<((?:\w+:)?think\w*)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_OPENED = re.compile(r"<((?:\w+:)?think\w*)>\s*\Z|\[(THINK)\]\s*\Z", re.IGNORECASE)


class Render(Protocol):
    """A conversation as the chat template writes it. Raises ChatTemplateError."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str: ...


def opened(prompt: str) -> re.Match[str] | None:
    """The tag of the think block that a prompt ends in."""
    return _OPENED.search(prompt)


@dataclass(frozen=True)
class Around:
    """What the template writes around a content: `head` is all before it."""

    head: str
    tail: str


def around(render: Render, before: Sequence[Message], *after: Message) -> Around:
    """Around an answer of one word to `before`. Raises ChatTemplateError where it is not written."""
    text = render([*before, {"role": "assistant", "content": _WORD}, *after], add_generation_prompt=False)
    head, found, tail = text.rpartition(_WORD)
    if not found:
        raise ChatTemplateError("the chat template does not write what an assistant says")
    return Around(head, tail)


def answer(render: Render, before: Sequence[Message], message: Message, prompt: str, tail: str) -> str:
    """What the assistant's `message` adds behind `prompt`, which asks for it after `before`, and what the template
    writes behind it. `tail` is that of most answers.

    Raises:
        ChatTemplateError: the template refuses the messages, or does not write the message.
    """
    text = render([*before, message], add_generation_prompt=False)
    block = opened(prompt)
    content = plain(message)
    if text.startswith(prompt):
        rest = text[len(prompt) :]
        if block:
            return _once_opened(block, message, rest)
        if content and rest.endswith(content + tail) and not _has_more(message):
            return content + tail  # what stands before it is the template's own
        glue = _glue(around(render, before).head, prompt)
        return rest[len(glue) :] if rest.startswith(glue) else rest
    if block and text.startswith(prompt[: block.start()]):
        rest = text[block.start() :]
    else:
        at = _common(text, around(render, before).head)
        thought = _OPENED.search(text, 0, at)  # it begins with its tag
        rest = text[thought.start() if thought else at :]
    return _inside_block(block, message, rest) if block else rest


def _glue(head: str, prompt: str) -> str:
    """What the template puts between a prompt and a content."""
    return head[len(prompt) :] if head.startswith(prompt) else ""


def block_tags(block: re.Match[str]) -> tuple[str, str]:
    """The tags that open and close a think block."""
    tag = block[0].strip()
    return tag, tag[:1] + "/" + tag[1:]


def _once_opened(block: re.Match[str], message: Message, rest: str) -> str:
    """`rest` behind a prompt that opens a think block. Some templates close it where there is no reasoning_content, and
    write a content that begins with a block of its own behind that: it is this one.
    """
    tag, close = block_tags(block)
    own = rest.lstrip().removeprefix(close).lstrip()
    if _BLOCK.match(plain(message)) is None or not rest.lstrip().startswith(close) or not own.startswith(tag):
        return rest
    return own[len(tag) :].lstrip("\n") if block[0].endswith("\n") else own[len(tag) :]


def _inside_block(block: re.Match[str], message: Message, rest: str) -> str:
    """`rest` behind a prompt that opens a think block, which the template leaves out of what it writes."""
    tag, close = block_tags(block)
    if rest.lstrip().startswith(tag):
        return rest.lstrip()[len(tag) :].lstrip("\n")
    thought = str(message.get("reasoning_content") or "")
    if not thought and close in plain(message):
        thought = plain(message).partition(close)[0].rpartition(tag)[2]
    if rest.lstrip().startswith(close):  # the template's own way to close it
        return thought.strip("\n") + rest.lstrip()
    if close in rest:
        rest = rest.partition(close)[2]
    return f"{thought.strip(chr(10))}\n{close}\n\n{rest.lstrip(chr(10))}"


def _has_more(message: Message) -> bool:
    """Whether there is something beside the content."""
    return bool(message.get("reasoning_content") or message.get("tool_calls"))


def thought_in(content: str) -> str:
    """What a content that begins with a think block has in it; "" where it has none."""
    block = _BLOCK.match(content)
    return block[2].strip() if block else ""


def _common(text: str, other: str) -> int:
    """How many characters both begin with."""
    if text.startswith(other):
        return len(other)
    return next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
