"""Tokens as a person reads them: what is learned in colour or between marks, special tokens apart from text that only
looks like them, and no character that cannot be seen (or that would do something to the terminal).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from coserve_agent.text.pieces import Pieces
from coserve_contract.shards import Sample

LINE_END = "↵"
_TAB = "⇥"
_JOINERS = "\u200c\u200d"
"""Part of how some languages, and emoji, are written."""


@dataclass(frozen=True)
class Piece:
    """A token, or those that make a whole character only together; `at` is the place of the first."""

    at: int
    tokens: tuple[int, ...]
    text: str
    learned: bool
    special: bool


def pieces_of(sample: Sample, vocabulary: Pieces) -> Iterator[Piece]:
    """A sample's tokens in their order. A byte that is no part of a character is a lone surrogate, as in
    "surrogateescape".
    """
    marked = [
        (n, token, bool(weight)) for n, (token, weight) in enumerate(zip(sample.tokens, sample.weights, strict=True))
    ]
    for (learned, special), run in groupby(marked, lambda one: (one[2], one[1] in vocabulary.special)):
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        text, held = "", list[tuple[int, int]]()
        for n, token, _ in run:
            text += decoder.decode(vocabulary.bytes_of(token))
            held.append((n, token))
            if not decoder.getstate()[0]:
                yield _piece(held, text, learned, special)
                text, held = "", []
        if held:
            yield _piece(held, text + decoder.decode(b"", final=True), learned, special)


def _piece(held: list[tuple[int, int]], text: str, learned: bool, special: bool) -> Piece:
    return Piece(held[0][0], tuple(token for _, token in held), text, learned, special)


def visible(text: str, marks: str = "") -> str:
    """`text` with a sign for each tab and before each line end, and codes for what else does not show, and for what
    could be taken for one of these signs or `marks`.
    """
    signs = {"\n": LINE_END + "\n", "\t": _TAB}
    return "".join(
        one if _plain(one) and one not in marks + LINE_END + _TAB + "⟨⟩" else signs.get(one) or _code(one)
        for one in text
    )


def one_line(text: str) -> str:
    """A sentence that may quote anything."""
    return "".join(one if _plain(one) else _code(one) for one in " ".join(text.split()))


def _plain(character: str) -> bool:
    return character.isprintable() or character in _JOINERS


def _code(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"⟨{number - 0xDC00:02X}⟩"
    return f"⟨U+{number:04X}⟩"


class Marks:
    """Text alone: «learned», ⟦special token⟧."""

    legend = f"«learned», ⟦special token⟧, {LINE_END} line end"

    def shown(self, pieces: Iterable[Piece]) -> str:
        written = ""
        for learned, run in groupby(pieces, lambda one: one.learned):
            text = "".join(map(self._one, run))
            written += f"«{text}»" if learned else text
        return written

    def alone(self, piece: Piece) -> str:
        text = self._one(piece).replace("\n", "")
        return f"«{text}»" if piece.learned else text

    def title(self, text: str) -> str:
        return text

    def bad(self, text: str) -> str:
        return text

    def good(self, text: str) -> str:
        return text

    def _one(self, piece: Piece) -> str:
        text = visible(piece.text, "«»⟦⟧")
        return f"⟦{text}⟧" if piece.special else text


class Colours(Marks):
    """For a terminal: what is learned stands on green, light and dark by turns so that each token shows."""

    legend = f"\x1b[30;42mlearned\x1b[0m, \x1b[36mspecial token\x1b[0m, {LINE_END} line end"

    def shown(self, pieces: Iterable[Piece]) -> str:
        return "".join(self._inked(piece, n % 2 == 1) for n, piece in enumerate(pieces))

    def alone(self, piece: Piece) -> str:
        return self._inked(piece).replace("\n", "")

    def title(self, text: str) -> str:
        return _ink("1", text)

    def bad(self, text: str) -> str:
        return _ink("1;31", text)

    def good(self, text: str) -> str:
        return _ink("1;32", text)

    def _inked(self, piece: Piece, light: bool = False) -> str:
        text = visible(piece.text)
        if piece.special:
            return _ink("30;46" if piece.learned else "36", text)
        return _ink("30;102" if light else "30;42", text) if piece.learned else text


def _ink(code: str, text: str) -> str:
    """Each line of it by itself, so that no colour runs on."""
    return "\n".join(line and f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n"))
