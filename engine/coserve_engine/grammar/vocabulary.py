"""What each token writes, in bytes, as tokenizer.json says: what a grammar is matched against.

Special tokens are set apart: a grammar is about text, and they write none. The decoder decides what a piece stands for:
letters for bytes (GPT-2's table), pieces of text with `<0x0A>` for single bytes and a letter for the space
(sentencepiece), or such pieces without the bytes. One whose tokens depend on where they stand is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve_engine.errors import ModelFolderError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MOST_BYTES = 256 << 20
"""Of tokenizer.json; vocabularies of 256 thousand tokens have 35 MB."""
NO_TEXT = 0xFF
"""No text in UTF-8 has this byte, and llguidance marks special tokens with it."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKUP = re.compile(r"<.*>", re.DOTALL)

Spelling = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Of a model's ids: what each writes, nothing where there is no token, and the special ones, by their names."""

    tokens: list[bytes]
    special: list[int]


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model folder, for the `size` ids that the model can choose: those that the tokenizer does not
    have write nothing, and what it has beyond them is left out.

    Raises:
        ModelFolderError: there is no fast tokenizer, it is broken, or its tokens write what their neighbours decide.
    """
    path = folder / FILE
    plan, config = _load(path), _load(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        spelt, pieces = _spelling(plan.get("decoder")), dict(_pieces(plan["model"]))
        added = {int(one["id"]): one for one in plan.get("added_tokens") or ()}
        added |= {int(id): one for id, one in (config.get("added_tokens_decoder") or {}).items()}
        names = {plan["model"].get("unk_token"), *_special_names(config)}
        special = {id for id, one in added.items() if one.get("special") or is_markup(one["content"])}
        pieces |= {id: one["content"] for id, one in added.items()}
        special |= {id for id, piece in pieces.items() if piece in names}
        tokens = [b""] * size
        for id, piece in pieces.items():
            if 0 <= id < size:
                tokens[id] = piece.encode() if id in special else spelt(piece)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelFolderError(f"{path}: is not as tokenizers writes it ({error!r}); copy the folder again") from None
    except _DecoderError as error:
        raise ModelFolderError(f"{path}: {error}; use a model whose tokenizer is one of bytes or pieces") from None
    never = [id for id, token in enumerate(tokens) if token[:1] == bytes([NO_TEXT])]
    for id in never:
        tokens[id] = b""
    return Vocabulary(tokens, sorted(id for id in special if 0 <= id < size))


def is_markup(text: str) -> bool:
    """Whether an added token looks like markup, and so writes no text though its tokenizer calls it no special one:
    `<tool_call>`, `<think>`.
    """
    return _MARKUP.fullmatch(text) is not None


class _DecoderError(Exception):
    """A decoder by which a token alone does not say what it writes."""


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelFolderError(f"{path}: is longer than {MOST_BYTES:,} bytes")
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFolderError(f"{path}: {error.strerror or error}; the folder needs a fast tokenizer") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: is no JSON ({error}); copy the folder again") from None
    if not isinstance(loaded, dict):
        raise ModelFolderError(f"{path}: is no JSON object; copy the folder again")
    return loaded


def _pieces(model: dict[str, Any]) -> Iterable[tuple[int, str]]:
    """(id, piece) of a tokenizer's own vocabulary."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return ((id, piece) for piece, id in vocab.items())
    return enumerate(piece for piece, _ in vocab)  # Unigram: with scores


def _special_names(config: dict[str, Any]) -> Iterator[str]:
    """Tokens that tokenizer_config.json makes special by their role."""
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    roles = (value for name, value in config.items() if name.endswith("_token"))
    for one in (*roles, *(extra.values() if isinstance(extra, dict) else extra)):
        if isinstance(one, dict):
            yield str(one["content"])
        elif isinstance(one, str):
            yield one


# ---- what a piece writes ----


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte: GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for one in decoder["decoders"]:
            yield from _steps(one)
    else:
        yield decoder


def _spelling(decoder: Any) -> Spelling:
    """What a decoder makes of a piece in the middle of a text."""
    if decoder is None:
        raise _DecoderError("has no decoder, so that tokens are put together with spaces")
    steps = list(_steps(decoder))
    if any(step["type"] == "ByteLevel" for step in steps):
        return _letters_for_bytes
    replaced: list[tuple[str, str]] = []
    single_bytes = fused = False
    for step in steps:
        match step["type"]:
            case "ByteFallback":
                single_bytes = True
            case "Fuse":
                fused = True
            case "Metaspace":
                replaced.append((str(step["replacement"]), " "))
            case "Replace" if isinstance(step["pattern"].get("String"), str):
                replaced.append((step["pattern"]["String"], str(step["content"])))
            case "Strip" if fused:
                pass  # of the whole text
            case other:
                raise _DecoderError(f"has a decoder ({other}) by which a token alone does not say what it writes")

    def spelt(piece: str) -> bytes:
        byte = _BYTE.fullmatch(piece) if single_bytes else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return spelt


_LETTERS = _byte_letters()
_TO_BYTES = str.maketrans({letter: chr(byte) for letter, byte in _LETTERS.items()})


def _letters_for_bytes(piece: str) -> bytes:
    """As tokenizers does: what has any other letter is text."""
    return piece.translate(_TO_BYTES).encode("latin-1") if _LETTERS.keys() >= set(piece) else piece.encode()
