"""Where a text can be cut such that its parts' tokens are the whole's: before a special token.

A tokenizer looks for its added tokens first and tokenises what is between them on its own. That a cut is exact needs
tokens that take no space from their neighbours and that no longer token hides.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer


class Cuts:
    """The cuts that `backend` allows at tokens that the chat template `source` names."""

    def __init__(self, backend: Tokenizer, source: str) -> None:
        added = list(backend.get_added_tokens_decoder().values())
        named = [one.content for one in added if one.content in source and _stands_alone(one)]
        safe = sorted((one for one in named if not _hidden(one, added)), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, safe))) if safe else None

    def last(self, text: str) -> int | None:
        """Where the last of those tokens begins in `text`."""
        if self._pattern is None:
            return None
        reach = 256
        while True:
            # From the end: a conversation is long, and its last token near.
            begin = max(0, len(text) - reach)
            found = [match.start() for match in self._pattern.finditer(text, begin)]
            if found:
                return found[-1]
            if begin == 0:
                return None
            reach *= 8


def _stands_alone(token: AddedToken) -> bool:
    return bool(token.special) and not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def _hidden(content: str, added: list[AddedToken]) -> bool:
    """Whether another token may be found where this one stands: it holds it, or ends as this one begins."""
    others = (one.content for one in added if one.content != content)
    return any(
        content in other or any(content.startswith(other[-n:]) for n in range(1, min(len(other), len(content) + 1)))
        for other in others
    )
