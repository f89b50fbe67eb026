"""Log-probabilities as the two kinds of completion show them.

A token's text is what it decodes to alone; one that ends inside a character shows U+FFFD there, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coserve_agent.tokenizer import Tokenizer
from coserve_engine.messages import TokenLogprobs

LOWEST = -9999.0
"""JSON has no infinity; vLLM's number for it."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of the text; `scores` is None for the first of a prompt."""

    token: int
    scores: TokenLogprobs | None


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode())}

    content = [
        {**entry(one.token, one.scores.logprob), "top_logprobs": [entry(*best) for best in one.scores.top]}
        for one in tokens
        if one.scores is not None
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[].logprobs` of completions, piece by piece: offsets go on where the last piece ended."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def show(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The next tokens of the text. `top_logprobs` of a token holds the token itself, too."""
        texts: list[str] = []
        offsets: list[int] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for one in tokens:
            text = _text(self._tokenizer, one.token)
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            if one.scores is None:
                values.append(None)
                tops.append(None)
                continue
            value = max(one.scores.logprob, LOWEST)
            values.append(value)
            best: dict[str, float] = {}
            for token, likely in one.scores.top:  # of two with the same text the likelier one is shown
                best.setdefault(_text(self._tokenizer, token), max(likely, LOWEST))
            tops.append({**best, text: value})
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
