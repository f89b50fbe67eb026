"""One running request, from the engine's tokens to text."""

from __future__ import annotations

from dataclasses import dataclass

from coserve_agent.engine.client import RefusedError, TokenStream
from coserve_agent.errors import EngineGoneError
from coserve_agent.generation.refusals import refusal
from coserve_agent.generation.transcript import ScoredToken, Transcript
from coserve_agent.http.errors import ApiError
from coserve_agent.requests.structured import Structure
from coserve_agent.telemetry.slo import RequestMeter
from coserve_engine.messages import FinishReason, Token, TokenLogprobs


@dataclass(frozen=True)
class Piece:
    """What came next of an answer: characters, the tokens behind them where their log-probabilities are wanted, and
    the ids of all that the model said, those at which it stopped included. `texts` are the characters that each
    brought.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


class Generation:
    """One running request. Close it in the end, whatever happened.

    One that is `scoring_only` ends when its prompt is computed, and says nothing.
    """

    def __init__(
        self,
        stream: TokenStream,
        meter: RequestMeter,
        transcript: Transcript,
        structure: Structure | None,
        *,
        scoring_only: bool = False,
    ) -> None:
        self._stream = stream
        self.meter = meter
        self._transcript = transcript
        self._structure = structure
        self._scoring_only = scoring_only
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self.failure: str | None = None
        """How the engine gave it up, as a result in the metrics: failed or refused."""
        self.mistaken = False
        """Whether that was the client's mistake, which breaks no promise."""

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def stop_string(self) -> str | None:
        """The one that ended it."""
        return self._transcript.stop_string

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the engine had computed before."""
        return 0 if self._stream.prompt is None else self._stream.prompt.cached_tokens

    def timing(self) -> dict[str, float | None]:
        """Its times so far, as vLLM writes them."""
        return self.meter.timing(self.completion_tokens)

    @property
    def prompt_scores(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each token of the prompt, if they were asked for; there with the first piece."""
        return (self._stream.prompt and self._stream.prompt.logprobs) or ()

    async def next_piece(self) -> Piece:
        """What the next tokens gave: no characters while they end inside one, or in what may be a stop string.

        Raises:
            ApiError: the engine refuses the request, or ended.
        """
        try:
            return self._consume(await self._stream.next_tokens())
        except RefusedError as error:
            said = refusal(error, self._structure)
            self.mistaken = said.status == 400
            self.failure = "refused" if self.mistaken or error.code == "overloaded" else "failed"
            raise said from None
        except EngineGoneError as error:
            self.failure = "failed"
            message = f"the engine stopped: {error}; send the request again"
            raise ApiError(500, message, code="engine_stopped") from None

    def close(self) -> None:
        self._stream.close()

    def _consume(self, tokens: list[Token]) -> Piece:
        if self._scoring_only:
            self.finish_reason = FinishReason.LENGTH.value
            return Piece(self._transcript.end())
        texts, ids = [], []
        for token in tokens:
            self.completion_tokens += 1
            ids.append(token.token)
            texts.append(self._transcript.push(token))
            if self._transcript.stopped:
                self.finish_reason = FinishReason.STOP.value
            elif token.finish is not None:
                self.finish_reason = token.finish.value
            if self.done:
                break
        return Piece("".join(texts), self._transcript.take_tokens(), tuple(ids), tuple(texts))
