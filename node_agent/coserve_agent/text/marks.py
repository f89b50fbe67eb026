"""Special tokens that whoever reads an answer must see, though its text leaves them out: each stands in the text as a
mark, half of a surrogate pair, which no text that was decoded from UTF-8 has. What the model spells in letters is never
taken for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_FIRST, _LAST = 0xD800, 0xDFFF
MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class Marks:
    """Of one tokenizer's special tokens (their texts by id) those that are written as one of `markers`."""

    def __init__(self, markers: Iterable[str] = (), special: Mapping[int, str] | None = None) -> None:
        known = {text: chr(_FIRST + n) for n, text in enumerate(dict.fromkeys(markers))}
        self.of: Mapping[int, str] = {id: known[text] for id, text in (special or {}).items() if text in known}
        """The mark of each token that has one."""
        self._seen = {text: known[text] for text in (special or {}).values() if text in known}

    def seen(self, marker: str) -> str:
        """How a marker looks in the text: a mark where it is a special token, else as it is."""
        return self._seen.get(marker, marker)


NO_MARKS = Marks()


def unmarked(text: str) -> str:
    """`text` as it is shown."""
    return text if text.isascii() else MARKS.sub("", text)
