"""What each token of a vocabulary stands for, in bytes, so that a text is its tokens' bytes in a row.

Decoding a token alone loses what its neighbours decide: many tokenizers strip the space before a text's first word, and
a token that holds a part of a character only shows as U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte: GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


class Pieces:
    """Bytes of tokens. Where the text of whole tokens is concerned the tokenizer's own decoder is asked, so that any
    will do that writes a token the same wherever it stands behind another.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added: Mapping[int, str] = {token: one.content for token, one in added.items()}
        """Tokens that are looked for in a text before all others."""
        self.special: Mapping[int, str] = {token: one.content for token, one in added.items() if one.special}
        """Tokens that texts leave out, and how they are written where they are shown all the same."""
        self._anchor = self._find_anchor(backend.get_vocab(with_added_tokens=False).values())
        self._behind: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        last_byte = backend.token_to_id("<0xFF>")
        self.falls_back_to_bytes = last_byte is not None and self._decode([last_byte]) == REPLACEMENT
        """Whether characters without a token of their own are spelt in tokens of one byte each, as sentencepiece does;
        the decoder then writes U+FFFD for each byte of a broken one.
        """

    def in_texts(self, token: int) -> bool:
        """Whether a decoder sees it at all: not special, and not one of the ids that fill a model's vocabulary up."""
        return token not in self.special and self._backend.id_to_token(token) is not None

    def bytes_of(self, token: int, *, first: bool = False) -> bytes:
        """A token's part of a text; `first` if none that is `in_texts` is before it. Special tokens have their own
        text; ids without a token have none.
        """
        known = self._first if first else self._behind
        found = known.get(token)
        if found is None:
            found = known[token] = self._look_up(token, first)
        return found

    def _look_up(self, token: int, first: bool) -> bytes:
        if token in self.special:
            return self.special[token].encode()
        text = self._decode([token]) if first else self._text_behind(token)
        if REPLACEMENT in text:  # a part of a character, most likely: only the piece says which bytes
            piece = self._backend.id_to_token(token) or ""
            if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
                return bytes.fromhex(byte[1])
            if all(letter in _BYTE_LETTERS for letter in piece):
                return bytes(_BYTE_LETTERS[letter] for letter in piece)
        return text.encode()

    def _text_behind(self, token: int) -> str:
        if self._anchor is None:
            return self._decode([token])
        return self._decode([self._anchor, token])[len(self._decode([self._anchor])) :]

    def _find_anchor(self, tokens: Iterable[int]) -> int | None:
        """A token to stand before those that are looked up: a plain word, or else one that shows something."""
        visible = None
        for token in sorted(tokens):
            piece = self._backend.id_to_token(token)
            if piece is None or _BYTE_PIECE.fullmatch(piece) or token in self.special:
                continue
            text = self._decode([token])
            if text.isascii() and text.isalnum():
                return token
            if visible is None and text and text == text.strip() and REPLACEMENT not in text:
                visible = token
        return visible

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text
