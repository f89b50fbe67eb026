"""Log-probabilities as the two kinds of completion show them.

A token's bytes are its part of the text. One that holds a part of a character only is written as OpenAI's API does:
`\\xf0\\x9f` in chats, `bytes:\\xf0\\x9f` in completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coserve_agent.generation.transcript import ScoredToken
from coserve_agent.text.pieces import Pieces
from coserve_engine.messages import TokenLogprobs

LOWEST = -9999.0
"""JSON has no infinity; vLLM's number for it."""


class Writer:
    """Writes tokens as text, or as `token_id:N` where the client wants that (vLLM's `return_tokens_as_token_ids`).

    `top` of the likeliest tokens stand beside each. Of those with the same text the chosen one has it, or else the
    likeliest; the others go by their id.
    """

    def __init__(self, pieces: Pieces, top: int, *, as_ids: bool) -> None:
        self._pieces, self._count, self._as_ids = pieces, top, as_ids

    def chat(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """`choices[].logprobs` of chat completions."""
        content = []
        for one in tokens:
            if one.scores is None:
                continue
            chosen = self._text(one.token, one.first)
            best = [
                self._entry(name, token, value, one.first)
                for name, token, value in self._named(one, one.scores, chosen)
            ]
            content.append({**self._entry(chosen, one.token, one.scores.logprob, one.first), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, name: str, token: int, logprob: float, first: bool) -> dict[str, Any]:
        part = self._pieces.bytes_of(token, first=first)
        return {"token": name, "logprob": max(logprob, LOWEST), "bytes": list(part)}

    def completion(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """`choices[].logprobs` of completions. `top_logprobs` of a token holds the token itself, too."""
        names, values, tops = [], [], []
        for one in tokens:
            name = self._text(one.token, one.first, "bytes:")
            names.append(name)
            values.append(None if one.scores is None else max(one.scores.logprob, LOWEST))
            tops.append(None if one.scores is None else self._top(one, one.scores, name))
        starts = [one.start for one in tokens]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": starts}

    def _top(self, one: ScoredToken, scores: TokenLogprobs, chosen: str) -> dict[str, float]:
        best = {name: max(value, LOWEST) for name, _, value in self._named(one, scores, chosen, "bytes:")}
        return {**best, chosen: max(scores.logprob, LOWEST)}

    def _named(
        self, one: ScoredToken, scores: TokenLogprobs, chosen: str, mark: str = ""
    ) -> list[tuple[str, int, float]]:
        """(text, token, log-probability) of the likeliest tokens; no two have the same text."""
        taken: dict[str, int] = {chosen: one.token}
        found = []
        for token, value in scores.top[: self._count]:
            name = self._text(token, one.first, mark)
            if taken.setdefault(name, token) != token:
                name = _by_id(token)
            found.append((name, token, value))
        return found

    def prompt(self, tokens: Sequence[ScoredToken], top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each token of the prompt the token's and the `top` likeliest ones', by id."""
        return [None if one.scores is None else self._ranked(one, one.scores, top) for one in tokens]

    def _ranked(self, one: ScoredToken, scores: TokenLogprobs, top: int) -> dict[str, Any]:
        ranked = [(one.token, scores.logprob, scores.rank)]
        ranked += [(token, value, n) for n, (token, value) in enumerate(scores.top[:top], 1) if token != one.token]
        return {
            str(token): {
                "logprob": max(value, LOWEST),
                "rank": rank,
                "decoded_token": self._decoded(token, one.first),
            }
            for token, value, rank in ranked
        }

    def _text(self, token: int, first: bool, mark: str = "") -> str:
        """A token as text; `mark` stands before a part of a character."""
        return _by_id(token) if self._as_ids else self._decoded(token, first, mark)

    def _decoded(self, token: int, first: bool, mark: str = "") -> str:
        part = self._pieces.bytes_of(token, first=first)
        try:
            return part.decode()
        except UnicodeDecodeError:
            return mark + part.decode(errors="backslashreplace")


def _by_id(token: int) -> str:
    return f"token_id:{token}"
