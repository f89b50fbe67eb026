"""The prompts of a request as tokens, and their text where it is part of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.structured import Structure
from coserve_agent.text.detokenize import Detokenizer
from coserve_agent.tools.reading import PLAIN, Reading
from coserve_engine.limits import shown


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from. `text` stands before the answer where the client asked for that, and `starts` says where
    in it each token begins. `max_tokens` of an answer; None: as many as fit. `reading` is how that is
    read, and `structure` what it is held to.
    """

    tokens: Sequence[int]
    max_tokens: int | None = None
    text: str = ""
    starts: Sequence[int] = ()
    reading: Reading = PLAIN
    structure: Structure | None = None


def read_prompts(
    tokenizer: Tokenizer, given: Sequence[str | list[int]], vocab_size: int, *, echo: bool
) -> list[Prompt]:
    """Prompts as texts or tokens.

    Raises:
        ApiError: 400 naming the prompt with a token that the model does not have.
    """
    prompts = []
    for n, one in enumerate(given):
        name = "prompt" if len(given) == 1 else f"prompt[{n}]"
        if isinstance(one, str):
            prompt = _of_text(tokenizer, one, echo)
            check_ids(prompt.tokens, vocab_size, name)
        else:
            check_ids(one, vocab_size, name)
            prompt = _of_tokens(tokenizer, one, echo)
        prompts.append(prompt)
    return prompts


def _of_text(tokenizer: Tokenizer, text: str, echo: bool) -> Prompt:
    if not echo:
        return Prompt(tokenizer.encode(text))
    tokens, starts = tokenizer.encode_placed(text)
    return Prompt(tokens, text=text, starts=starts)


def _of_tokens(tokenizer: Tokenizer, tokens: Sequence[int], echo: bool) -> Prompt:
    """A character that the last tokens only begin belongs to the answer."""
    if not echo:
        return Prompt(tokens)
    detokenizer = Detokenizer(tokenizer.pieces)
    text, starts = "", []
    for token in tokens:
        starts.append(detokenizer.chars)
        text += detokenizer.push(token)
    return Prompt(tokens, text=text, starts=starts)


def check_ids(tokens: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises ApiError 400 for tokens that the model has no row for; `name` is the field with its index."""
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise bad_request(
            f"{name} has token {shown(wrong)}, which the model does not have; it has 0 to {vocab_size - 1}",
            name.partition("[")[0],
            "invalid_value",
        )
