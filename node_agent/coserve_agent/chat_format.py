"""How a chat template takes the content of a message: as one string, or as a list of parts that it loops over.

Templates do not say. vLLM looks in their syntax tree for a loop over the content; here, as in llama.cpp, two words are
rendered and looked for in the text, which sees through macros, indices and filters alike, and tells the roles of one
template apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]
"""A conversation as text; raises `error` of `roles_in_parts` where the template refuses it."""

_WORDS = ("quokka", "wombat")
_LEAK = "numbat"
"""Stands in a field that no template reads: it shows only where the list itself was written."""


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def shaped(message: Message, in_parts: frozenset[str]) -> dict[str, Any]:
    """`message` with its content (a string or a list of text parts) as the template takes it.

    `in_parts` are the roles of which it takes parts. Others get one string, parts joined by line ends as in vLLM; so
    do results of tools always. A role of the client's own is taken as the user's.
    """
    role, content = message["role"], message["content"]
    known = role if role in ("system", "assistant", "tool") else "user"
    if known in in_parts:
        return {**message, "content": [text_part(content)] if isinstance(content, str) else content}
    return {**message, "content": content if isinstance(content, str) else "\n".join(part["text"] for part in content)}


def roles_in_parts(render: Render, error: type[Exception]) -> frozenset[str]:
    """Of system, user and assistant those whose parts the template writes, all of them and nothing else of the list."""
    parts = [{**text_part(word), _LEAK: _LEAK} for word in _WORDS]
    found: frozenset[str] = frozenset()

    def said(role: str, content: str | list[dict[str, str]] = "x") -> dict[str, Any]:
        return shaped({"role": role, "content": content}, found | {role} if content is parts else found)

    def loops(*conversation: Message) -> bool:
        try:
            text = render(conversation).lower()
        except error:
            return False
        return all(word in text for word in _WORDS) and _LEAK not in text

    # Some templates insist on a system message.
    if loops(said("user", parts)) or loops(said("system"), said("user", parts)):
        found |= {"user"}
    if loops(said("system", parts), said("user")):
        found |= {"system"}
    if loops(said("user"), said("assistant", parts), said("user")):
        found |= {"assistant"}
    return found
