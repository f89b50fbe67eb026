"""What a request says beside its messages about the whole conversation, as a message of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Content = str | Sequence[Any]
"""A text, or a list of parts."""


def with_system(said: Content | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` behind a system message that says `said`; one that they begin with is joined to it, since many
    templates write no second one.
    """
    if not said:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": said}, *messages]
    return [{"role": "system", "content": _joined(said, first["content"])}, *messages[1:]]


def _joined(first: Content, second: Content) -> Content:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), {"type": "text", "text": "\n\n"}, *_parts(second)]


def _parts(content: Content) -> Sequence[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
