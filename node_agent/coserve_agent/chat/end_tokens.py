"""The tokens that end an answer: one list, for what serving stops at and what finetuning teaches.

Folders name them in four places, and chat models often have one in only some of them: config.json and
generation_config.json (`eos_token_id`), the tokenizer's `eos_token`, and the chat template, which ends a turn with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coserve_agent.chat.format import USER
from coserve_agent.chat.template import ChatTemplateError
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.turns import around
from coserve_agent.errors import StartError
from coserve_agent.model import generation_config

CONFIG = "config.json"


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end tokens of the model in `folder`, the tokenizer's own first.

    Raises:
        StartError: a file holds no token id where one is meant, or an id that the model has no row for.
    """
    config = _config(folder)
    named: dict[str, Sequence[int]] = {
        "the tokenizer's eos_token": [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        f"{folder / generation_config.FILE}: eos_token_id": generation_config.end_tokens(folder),
        f"{folder / CONFIG}: eos_token_id": generation_config.token_ids(folder / CONFIG, config.get("eos_token_id")),
    }
    ends = tuple(dict.fromkeys(token for tokens in named.values() for token in tokens))
    last = end_of_turn(tokenizer, ends).token
    named["the chat template's end of turn"] = [] if last is None else [last]
    size = config.get("vocab_size")
    for where, tokens in named.items():
        wrong = next((token for token in tokens if isinstance(size, int) and token >= size), None)
        if wrong is not None:
            raise StartError(
                f"{where} has {wrong} but the model's vocab_size is {size}; copy the file from the same model, or take "
                "the id out"
            )
    return tuple(dict.fromkeys(token for tokens in named.values() for token in tokens))


@dataclass(frozen=True)
class EndOfTurn:
    """How the chat template ends an assistant's turn: `tail` is all that it writes behind an answer that ends a
    conversation, `text` its part up to the special token `token`, with which the turn ends; None where there is none.
    """

    tail: str = ""
    text: str = ""
    token: int | None = None


def end_of_turn(tokenizer: Tokenizer, ends: Sequence[int]) -> EndOfTurn:
    """The end of a turn is what stands behind it in the middle of a conversation, too, up to the first of `ends` or
    else to its last special token. (Some templates end a conversation in another way: the first special token then.)
    """
    for before in ([USER], [{**USER, "role": "system"}, USER]):
        try:
            around_last = around(tokenizer.render, before)
            between = around(tokenizer.render, before, USER).tail
        except ChatTemplateError:
            continue
        tail = around_last.tail
        specials = _specials(tokenizer, tail, ends)
        common = [one for one in specials if between.startswith(tail[: one.end])]
        chosen = next((one for one in common if one.token in ends), common[-1] if common else None)
        if chosen is None and specials:
            chosen = next((one for one in specials if one.token in ends), specials[0])
        return EndOfTurn(tail) if chosen is None else EndOfTurn(tail, tail[: chosen.end], chosen.token)
    return EndOfTurn()


class _Special(NamedTuple):
    """A special token in a text, and where it ends."""

    token: int
    end: int


def _specials(tokenizer: Tokenizer, text: str, ends: Sequence[int]) -> list[_Special]:
    """Those of a text, and added tokens among `ends`: some folders forget to call them special."""
    added = {token: name for token, name in tokenizer.pieces.added.items() if token in ends}
    special, found, end = {**tokenizer.pieces.special, **added}, [], 0
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token in special:
            end = text.index(special[token], end) + len(special[token])
            found.append(_Special(token, end))
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StartError(f"{folder / CONFIG}: not readable as JSON ({error}); copy the model folder again") from None
    return config if isinstance(config, dict) else {}
