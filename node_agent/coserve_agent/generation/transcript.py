"""What an answer's tokens become: its text, up to a stop string, and where in it each token begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve_agent.requests.prompts import Prompt
from coserve_agent.text.detokenize import Detokenizer, StopStrings
from coserve_agent.text.marks import unmarked
from coserve_agent.text.pieces import Pieces
from coserve_engine.messages import FinishReason, Token, TokenLogprobs


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text: `start` is the character at which it begins, `first` whether no word is before it. `scores`
    is None where nothing is before it at all.
    """

    token: int
    scores: TokenLogprobs | None
    start: int
    first: bool


class Transcript:
    """One answer, token by token. It goes on behind its prompt: the first word keeps the space before it.

    Stop strings are looked for in what follows the first `min_tokens` tokens, as stop tokens are. Tokens are handed out
    with the text that they begin in; those behind a stop string never are. Special tokens that `prompt.reading` looks
    for are marks in the text.
    """

    def __init__(self, pieces: Pieces, prompt: Prompt, stop: Sequence[str], min_tokens: int) -> None:
        self._special = pieces.special
        self._marks = prompt.reading.marks.of
        self._detokenizer = Detokenizer(pieces, prompt.tokens)
        self._stops = StopStrings(stop, pieces.special.values())
        self._min_tokens = min_tokens
        self._tokens = 0
        self._origin = len(prompt.text)
        self._shown = len(prompt.text)
        self._scored: list[ScoredToken] = []
        self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self.stop_string is not None

    @property
    def stop_string(self) -> str | None:
        return self._stops.found

    def push(self, token: Token) -> str:
        """Text that can be shown now. The token that the engine stopped at is no part of it."""
        self._tokens += 1
        text = special = ""
        if token.finish is not FinishReason.STOP:
            if token.logprobs is not None:
                start = self._origin + self._detokenizer.chars
                self._scored.append(ScoredToken(token.token, token.logprobs, start, self._detokenizer.first))
            text = self._detokenizer.push(token.token) + self._marks.get(token.token, "")
            special = self._special.get(token.token, "")
        return self._show(text, special, end=token.finish is not None)

    def end(self) -> str:
        """Text that is left where no token is to come."""
        return self._show("", "", end=True)

    def _show(self, text: str, special: str, *, end: bool) -> str:
        if end:
            text += self._detokenizer.flush()
        if self._tokens > self._min_tokens:
            text = self._stops.push(text, special)
        if end and not self.stopped:
            text += self._stops.flush()
        self._shown += len(unmarked(text))
        self._ended = end
        return text

    def take_tokens(self) -> tuple[ScoredToken, ...]:
        """Tokens that begin in the text so far, each once."""
        if self._ended and not self.stopped:
            ready = len(self._scored)
        else:
            ready = sum(one.start < self._shown for one in self._scored)
        taken, self._scored = tuple(self._scored[:ready]), self._scored[ready:]
        return taken


def prompt_tokens(pieces: Pieces, prompt: Prompt, scores: Sequence[TokenLogprobs | None]) -> list[ScoredToken]:
    """The prompt's tokens as part of a text that begins with it; none where their scores are not there."""
    found, first = [], True
    for token, score, start in zip(prompt.tokens, scores, prompt.starts or [0] * len(prompt.tokens), strict=False):
        found.append(ScoredToken(token, score, start, first))
        first = first and not pieces.in_texts(token)
    return found
