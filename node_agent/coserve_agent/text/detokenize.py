"""Text of a growing token sequence, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import islice

from coserve_agent.text.marks import MARKS
from coserve_agent.text.pieces import REPLACEMENT, Pieces

CHARACTER_BYTES = 4
"""No character has more in UTF-8."""


class Detokenizer:
    """Text of tokens as they come. The pieces joined are the text of the whole sequence."""

    def __init__(self, pieces: Pieces, before: Sequence[int] = ()) -> None:
        """`before` are tokens whose text is not wanted, but goes on here: where it does, no decoder strips the space
        before a word, and a character that they began is ended.
        """
        self._pieces = pieces
        self._pending = b""
        self.first = True
        """Whether nothing was before that a decoder sees."""
        self.chars = 0
        """How many characters of its own are complete."""
        words = (token for token in reversed(before) if pieces.in_texts(token))
        for token in reversed(list(islice(words, CHARACTER_BYTES))):
            self.push(token)
        self.chars = 0

    def push(self, token: int) -> str:
        """Text that `token` completed; empty while it ends inside a character."""
        if token in self._pieces.special:
            return ""
        text = self._read(self._pieces.bytes_of(token, first=self.first))
        self.first = self.first and not self._pieces.in_texts(token)
        return text

    def flush(self) -> str:
        """What is held, an unfinished character shown as U+FFFD."""
        return self._read(b"", final=True)

    def _read(self, data: bytes, *, final: bool = False) -> str:
        text, data = "", self._pending + data
        while True:
            try:
                whole, used = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                wrong = error.end - error.start if self._pieces.falls_back_to_bytes else 1
                text += data[: error.start].decode() + REPLACEMENT * wrong
                data = data[error.end :]
                continue
            text, self._pending = text + whole, data[used:]
            self.chars += len(text)
            return text


class StopStrings:
    """Cuts text at the first stop string and holds back what could become the beginning of one.

    Texts leave special tokens out. A stop string that holds the text of one is looked for in the text with them. Marks
    stay in a text, and no stop string sees them.
    """

    def __init__(self, stops: Sequence[str], special_texts: Iterable[str] = ()) -> None:
        special = tuple(special_texts)
        self._plain = tuple(stop for stop in stops if not any(text in stop for text in special))
        self._with_special = tuple(stop for stop in stops if stop not in self._plain)
        self._held = ""
        self._left_out: list[int] = []
        """Where in `_held` the characters are that are not shown."""
        self.found: str | None = None

    def push(self, text: str, special: str = "") -> str:
        """Text that is safe to show; once a stop string was found, nothing more. `special` is what stands behind
        `text` and is not shown.
        """
        if self.found is not None:
            return ""
        if not self._plain and not self._with_special:
            return text
        end = len(self._held) + len(text)
        self._held += text
        if self._with_special and special:
            self._held += special
            self._left_out += range(end, end + len(special))
        return self._release(self._cut())

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        return self._release(len(self._held))

    def _cut(self) -> int:
        """Up to where what is held can be shown; notes a stop string that was found there."""
        held = self._held
        marked = not held.isascii() and MARKS.search(held) is not None
        seen = [at for at, letter in enumerate(held) if not MARKS.match(letter)] if marked else None
        shown = seen
        if self._left_out:
            shown = [at for at in (range(len(held)) if seen is None else seen) if at not in self._left_out]
        hits, keep = [], [len(held)]
        for stops, places in ((self._plain, shown), (self._with_special, seen)):
            text = held if places is None else "".join(held[at] for at in places)
            for stop in stops:
                if (at := text.find(stop)) >= 0:
                    hits.append((at if places is None else places[at], stop))
                elif (length := overlap(text, stop)) > 0:
                    at = len(text) - length
                    keep.append(at if places is None else places[at])
        if hits:
            at, self.found = min(hits)
            return at
        return min(keep)

    def _release(self, end: int) -> str:
        text = self._held[:end]
        if self._left_out:
            text = "".join(letter for at, letter in enumerate(text) if at not in self._left_out)
        self._held = "" if self.found is not None else self._held[end:]
        self._left_out = [at - end for at in self._left_out if at >= end]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
