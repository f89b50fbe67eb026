"""How a chat template takes the content of a message: as one string, or as a list of parts that it loops over.

Templates do not say. vLLM looks in their syntax tree for a loop over the content; here, as in llama.cpp, two words are
rendered and looked for in the text, which sees through macros, indices and filters alike, and tells the roles of one
template apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coserve_agent.chat.template import ChatTemplateError, Message

Render = Callable[[Sequence[Message]], str]
"""A conversation as text. Raises ChatTemplateError where the template refuses it."""
USER: Message = {"role": "user", "content": "x"}
"""To ask a template with."""

_WORDS = ("quokka", "wombat")
_LEAK = "numbat"
"""Stands in a field that no template reads: it shows only where the list itself was written."""


def plain(message: Message) -> str:
    """A message's content as one text."""
    content: Any = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def tried(render: Render, conversation: Sequence[Message]) -> str:
    """A conversation as text; "" where the template refuses it."""
    try:
        return render(conversation)
    except ChatTemplateError:
        return ""


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def shaped(message: Message, in_parts: frozenset[str], in_one_part: frozenset[str] = frozenset()) -> dict[str, Any]:
    """`message` with its content (a string or a list of text parts) as the template takes it.

    `in_parts` are the roles of which it takes parts, `in_one_part` those of which it writes the first part alone.
    Others get one string, parts joined by line ends as in vLLM; so do results of tools always. A role of the client's
    own is taken as the user's.
    """
    role, content = message["role"], message["content"]
    known = role if role in ("system", "assistant", "tool") else "user"
    if known in in_parts:
        return {**message, "content": [text_part(content)] if isinstance(content, str) else content}
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    return {**message, "content": [text_part(text)] if known in in_one_part else text}


def roles_in_parts(render: Render) -> frozenset[str]:
    """Of system, user and assistant those whose parts the template writes, all of them and nothing else of the list."""
    parts = [{**text_part(word), _LEAK: _LEAK} for word in _WORDS]
    found: frozenset[str] = frozenset()

    def said(role: str, content: str | list[dict[str, str]] = "x") -> dict[str, Any]:
        return shaped({"role": role, "content": content}, found | {role} if content is parts else found)

    def loops(*conversation: Message) -> bool:
        text = tried(render, conversation).lower()
        return all(word in text for word in _WORDS) and _LEAK not in text

    # Some templates insist on a system message.
    if loops(said("user", parts)) or loops(said("system"), said("user", parts)):
        found |= {"user"}
    if loops(said("system", parts), said("user")):
        found |= {"system"}
    if loops(said("user"), said("assistant", parts), said("user")):
        found |= {"assistant"}
    return found


def roles_in_one_part(render: Render, in_parts: frozenset[str]) -> frozenset[str]:
    """Of the other roles those of which the template writes the first part, and takes no string."""
    found: frozenset[str] = frozenset()

    def writes(role: str, one_part: frozenset[str]) -> bool:
        said: Message = {"role": role, "content": _WORDS[0]}
        conversation = {"system": [said, USER], "user": [said], "assistant": [USER, said, USER]}[role]
        text = tried(render, [shaped(message, in_parts, one_part) for message in conversation]).lower()
        return _WORDS[0] in text and _LEAK not in text and "{" not in text

    for role in ("user", "system", "assistant"):
        if role not in in_parts and not writes(role, found) and writes(role, found | {role}):
            found |= {role}
    return found
