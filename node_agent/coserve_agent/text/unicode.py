"""What is text: whole characters. JSON can write half of a surrogate pair, which no tokenizer takes and UTF-8 lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LONE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Surrogate:
    """Half of a surrogate pair: the way to the string that holds it, and its escape (\\\\ud800)."""

    path: tuple[str, ...]
    escape: str

    def __str__(self) -> str:
        where = ".".join(self.path)[:200] or "the text"
        return f"{where} holds {self.escape}, half of a surrogate pair, which is no character; write whole characters"


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair in `text` as its escape, or None."""
    if text.isascii():
        return None
    found = _LONE.search(text)
    return None if found is None else f"\\u{ord(found[0]):04x}"


def surrogate_in_json(source: str, data: Any) -> Surrogate | None:
    """The same anywhere in `data`, names of fields included, which was parsed from `source`."""
    if _ESCAPED.search(source):
        for path, text in _strings(data):
            escape = lone_surrogate(text)
            if escape is not None:
                # A name that holds one is shown by its escapes: no message could be sent with it.
                return Surrogate(tuple(str(part).encode("utf-8", "backslashreplace").decode() for part in path), escape)
    return None


def values_in_json(data: Any) -> Iterator[tuple[Path, Any]]:
    """All values in `data`, itself and objects and lists included, each with the way to it."""
    left: list[tuple[Path, Any]] = [((), data)]
    while left:
        path, value = left.pop()
        yield path, value
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left.extend(((*path, name), child) for name, child in children)


def _strings(data: Any) -> Iterator[tuple[Path, str]]:
    for path, value in values_in_json(data):
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict):
            yield from (((*path, name), name) for name in value)
