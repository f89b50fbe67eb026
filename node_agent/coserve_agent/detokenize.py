"""Text of a growing token sequence, piece by piece: whole characters only, and nothing of a stop string.

The window method is that of vLLM and TGI: decode the last emitted tokens with and without the new ones and emit the
difference, so that a decoder that strips a leading space or joins bytes sees enough context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

REPLACEMENT = "\ufffd"
# No character has more bytes than four; a decoder that still ends in U+FFFD after this many tokens means it.
MAX_HELD_TOKENS = 8

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of tokens as they come. The pieces joined are the text of the whole sequence."""

    def __init__(self, decode: Decode, special_ids: Set[int] = frozenset()) -> None:
        """`special_ids` are tokens that `decode` shows as nothing."""
        self._decode = decode
        self._special_ids = special_ids
        self._context: list[int] = []  # emitted already, kept so that the decoder sees what came before
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Text that `token` completed; empty while it ends inside a character."""
        if token in self._special_ids:
            return ""
        self._held.append(token)
        text = self._held_text()
        if len(self._held) < MAX_HELD_TOKENS and (not text or text.endswith(REPLACEMENT)):
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is held, an unfinished character shown as U+FFFD."""
        if not self._held:
            return ""
        text = self._held_text()
        self._context, self._held = self._held, []
        return text

    def _held_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]


class StopStrings:
    """Cuts text at the first stop string and holds back what could become the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show; once a stop string was found, nothing more."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
