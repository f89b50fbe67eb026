"""From a parsed request to text: admission, the engine's token stream, characters, stop strings and usage."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.engine.client import EngineClient, RefusedError, TokenStream
from coserve_agent.errors import EngineGoneError
from coserve_agent.generation import context
from coserve_agent.generation.transcript import ScoredToken, Transcript
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.model.generation_config import SamplingDefaults
from coserve_agent.requests.params import ChatRequest, Common
from coserve_agent.requests.prompts import Prompt
from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.slo import RequestMeter, SloMeter
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    FinishReason,
    SamplingParams,
    Token,
    TokenLogprobs,
)

T = TypeVar("T")

RETRY_AFTER_S = 1
SMALL_TEXT_CHARS = 8192


@dataclass(frozen=True)
class Served:
    """A name that clients may send as `model`. `root` says where the weights are from; `version` None is the base
    model. `variables` are the chat template's, where a request does not say.
    """

    name: str
    version: AdapterVersion | None
    root: str
    created_s: int
    parent: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unloaded:
    """A name that should be served: its version did not load, or has not been loaded yet."""

    failed: bool
    retry_after_s: int


class Models(Protocol):
    """The names that are served now."""

    def resolve(self, name: str) -> Served | None: ...

    def unloaded(self, name: str) -> Unloaded | None:
        """What is known of a published name that `resolve` does not find."""
        ...

    def listing(self) -> list[Served]:
        """The base model first."""
        ...


@dataclass(frozen=True)
class Piece:
    """What came next of an answer: characters, the tokens behind them where their log-probabilities are wanted, and
    the ids of all that the model said, those at which it stopped included.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    ids: tuple[int, ...] = ()


class Generation:
    """One running request. Close it in the end, whatever happened.

    One that is `scoring_only` ends when its prompt is computed, and says nothing.
    """

    def __init__(
        self, stream: TokenStream, meter: RequestMeter, transcript: Transcript, *, scoring_only: bool = False
    ) -> None:
        self._stream = stream
        self.meter = meter
        self._transcript = transcript
        self._scoring_only = scoring_only
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self.failure: str | None = None
        """How the engine gave it up, as a result in the metrics: failed or refused."""

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the engine had computed before."""
        return 0 if self._stream.prompt is None else self._stream.prompt.cached_tokens

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
            self.failure = "refused" if error.code == "overloaded" else "failed"
            raise _refusal(error) from None
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
        text, ids = "", []
        for token in tokens:
            self.completion_tokens += 1
            ids.append(token.token)
            text += self._transcript.push(token)
            if self._transcript.stopped:
                self.finish_reason = FinishReason.STOP.value
            elif token.finish is not None:
                self.finish_reason = token.finish.value
            if self.done:
                break
        return Piece(text, self._transcript.take_tokens(), tuple(ids))


class Generator:
    """Admits requests and begins them."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        models: Models,
        lifecycle: Lifecycle,
        meter: SloMeter,
        metrics: Metrics,
        max_model_length: int,
        max_waiting: int,
        now_s: Callable[[], float],
        defaults: SamplingDefaults,
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.models = models
        self._lifecycle = lifecycle
        self._meter = meter
        self._metrics = metrics
        self.max_model_length = max_model_length
        self._max_waiting = max_waiting
        self.now_s = now_s
        self.defaults = defaults

    @property
    def vocab_size(self) -> int:
        """Of the model; there once `check_open` lets requests in."""
        return self._engine.vocab_size

    def check_open(self) -> None:
        """Raises ApiError 503 while loading, 500 without an engine."""
        if not self._engine.alive:
            raise self._refused(500, "the engine stopped; the agent is restarting", "engine_stopped")
        if not self._lifecycle.model_loaded:
            raise self._refused(503, "the model is being loaded; send the request again", "loading")

    def served(self, name: str) -> Served:
        """Raises ApiError 404 naming what is served, 503 for a name that is published and not loaded."""
        served = self.models.resolve(name)
        if served is not None:
            return served
        unloaded = self.models.unloaded(name)
        if unloaded is not None and unloaded.failed:
            message = f"model {name!r} is published and could not be loaded here; it is tried again"
            raise self._refused(503, message, "adapter_not_loaded", unloaded.retry_after_s)
        if unloaded is not None or not self._lifecycle.adapters_known:
            raise self._refused(
                503, f"model {name!r} may be published but is not loaded yet; try again later", "loading"
            )
        known = ", ".join(one.name for one in self.models.listing())
        raise ApiError(
            404, f"model {name!r} is not served here; served are: {known}", param="model", code="model_not_found"
        )

    def check_choices(self, prompts: int, request: Common) -> None:
        """Raises ApiError 400 for more choices than may ever wait, before anything is done for them."""
        choices = prompts * (request.n or 1)
        if choices > self._max_waiting:
            raise bad_request(
                f"{prompts} prompt{'s' * (prompts > 1)} with n {request.n or 1} ask for {choices} choices, but at most "
                f"{self._max_waiting} may wait here; send fewer prompts a request, or a smaller n",
                "prompt" if prompts > 1 else "n",
                "invalid_value",
            )

    async def encode(self, encode: Callable[[], T], chars: int) -> T:
        """Tokenise; long texts in a thread, so that nobody waits for them."""
        return encode() if chars < SMALL_TEXT_CHARS else await asyncio.to_thread(encode)

    def begin(self, request_id: str, prompts: Sequence[Prompt], request: Common, arrival_s: float) -> list[Generation]:
        """Hand the request to the engine, once for each choice it asks for: those of the first prompt, then others.

        From resolving the name on nothing waits, so it keeps the version it got.

        Raises:
            ApiError: 400 if it does not fit the context, 404, 429 if too many wait, 503.
        """
        self.check_open()
        served = self.served(request.model)
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        limits = [self._check_length(len(prompt.tokens), prompt.max_tokens, field) for prompt in prompts]
        choices = len(prompts) * (request.n or 1)
        if self._engine.waiting() + choices > self._max_waiting:
            raise self._refused(
                429,
                f"{self._engine.waiting()} requests are waiting and at most {self._max_waiting} may; try again later",
                "overloaded",
            )
        begun: list[Generation] = []
        try:
            for prompt, max_tokens in zip(prompts, limits, strict=True):
                params = self._params(request, max_tokens)
                seed = secrets.randbits(62) if request.seed is None else request.seed
                for n in range(request.n or 1):  # the choices of a seed are those of the seeds that follow it
                    command = AddRequest(
                        f"{request_id}-{len(begun)}",
                        tuple(prompt.tokens),
                        replace(params, seed=seed + n),
                        arrival_s,
                        served.version,
                    )
                    transcript = Transcript(self.tokenizer.pieces, prompt, request.stop or (), params.min_tokens)
                    generation = self._begin(
                        command, transcript, streams=bool(request.stream), scoring_only=max_tokens == 0
                    )
                    begun.append(generation)
        except ApiError:
            for generation in begun:
                self.end(generation)
            raise
        return begun

    def _begin(self, command: AddRequest, transcript: Transcript, *, streams: bool, scoring_only: bool) -> Generation:
        meter = self._meter.request(command.arrival_s, command.request_id, streams=streams)
        try:
            stream = self._engine.generate(command, meter.token)
        except EngineGoneError as error:
            raise self._refused(500, f"the engine stopped: {error}", "engine_stopped") from None
        meter.placed_s = lambda: command.arrival_s if stream.prompt is None else stream.prompt.placed_s
        return Generation(stream, meter, transcript, scoring_only=scoring_only)

    def _params(self, request: Common, max_tokens: int) -> SamplingParams:
        defaults = self.defaults
        return SamplingParams(
            max_tokens=max(1, max_tokens),  # the engine computes a prompt for the token that follows it
            temperature=_said(request.temperature, defaults.temperature),
            top_p=_said(request.top_p, defaults.top_p),
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            top_k=max(0, _said(request.top_k, defaults.top_k)),
            min_p=_said(request.min_p, defaults.min_p),
            repetition_penalty=_said(request.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=tuple((request.logit_bias or {}).items()),
            min_tokens=request.min_tokens or 0,
            logprobs=request.output_logprobs,
            prompt_logprobs=request.scored_prompt,
        )

    def end(self, generation: Generation) -> None:
        """Free the request in the engine if it runs still, and judge it."""
        generation.close()
        meter = generation.meter
        if generation.failure is not None:
            meter.fail()
            self._metrics.on_request(generation.failure)
        elif not generation.done:
            meter.cancel()
            self._metrics.on_request("cancelled")
        else:
            meter.finish()
            self._metrics.on_request("ok")

    def _check_length(self, prompt_tokens: int, max_tokens: int | None, param: str) -> int:
        limit = self.max_model_length
        if prompt_tokens == 0:
            raise bad_request("the prompt has no tokens; send at least one", param, "invalid_value")
        if prompt_tokens >= limit:
            raise context.prompt_too_long(prompt_tokens, limit, param)
        if max_tokens is not None and prompt_tokens + max_tokens > limit:
            raise context.answer_too_long(prompt_tokens, max_tokens, limit)
        room = limit - prompt_tokens
        return min(self.defaults.max_tokens or room, room) if max_tokens is None else max_tokens

    def _refused(self, status: int, message: str, code: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
        self._meter.refused()
        self._metrics.on_request("refused")
        return ApiError(status, message, code=code, retry_after_s=None if status == 500 else retry_after_s)


def _said(value: T | None, default: T) -> T:
    return default if value is None else value


def _refusal(error: RefusedError) -> ApiError:
    if error.code == "unknown_adapter":
        return ApiError(404, str(error), param="model", code="model_not_found")
    if error.code == "context_length_exceeded":
        return bad_request(str(error), "messages", error.code)
    if error.code == "invalid_token":
        return bad_request(str(error), "prompt", error.code)
    if error.code == "invalid_parameter":
        return bad_request(str(error), error.field, "invalid_value")
    if error.code == "overloaded":
        return ApiError(429, str(error), code=error.code, retry_after_s=RETRY_AFTER_S)
    if error.code == "draining":
        return ApiError(503, str(error), code=error.code, retry_after_s=RETRY_AFTER_S)
    return ApiError(500, f"the engine could not run the request: {error}", code=error.code)
