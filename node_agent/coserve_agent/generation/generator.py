"""Which requests are let in, and how they begin: by name, by length, and by how many wait already."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from coserve_agent.adapters.served import Models, Served
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.engine.client import EngineClient
from coserve_agent.errors import EngineGoneError
from coserve_agent.generation import context
from coserve_agent.generation.generation import Generation
from coserve_agent.generation.refusals import RETRY_AFTER_S
from coserve_agent.generation.sampling import sampling_params
from coserve_agent.generation.transcript import Transcript
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.model.generation_config import SamplingDefaults
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt
from coserve_agent.requests.structured import Structure
from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.slo import SloMeter
from coserve_engine.messages import AddRequest

T = TypeVar("T")

SMALL_TEXT_CHARS = 8192


@dataclass(frozen=True)
class Begun:
    """What a request runs on, and its choices."""

    served: Served
    generations: list[Generation]


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
        ttft_s: float,
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
        self._ttft_s = ttft_s
        self.now_s = now_s
        self.defaults = defaults
        self.in_flight = 0
        """Requests whose answers are being written."""

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
        raise self._not_served(name)

    def _not_served(self, name: str) -> ApiError:
        unloaded = self.models.unloaded(name)
        if unloaded is not None and unloaded.failed:
            message = f"model {name!r} is published and could not be loaded here; it is tried again"
            return self._refused(503, message, "adapter_not_loaded", unloaded.retry_after_s)
        if unloaded is not None or not self._lifecycle.adapters_known:
            return self._refused(
                503, f"model {name!r} may be published but is not loaded yet; try again later", "loading"
            )
        known = ", ".join(one.name for one in self.models.listing())
        return ApiError(
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

    async def begin(self, request_id: str, prompts: Sequence[Prompt], request: Common, arrival_s: float) -> Begun:
        """Hand the request to the engine, once for each choice it asks for: those of the first prompt, then others. It
        keeps the version of an adapter with which it begins; one that made room for others is waited for.

        Raises:
            ApiError: 400 if it does not fit the context, 404, 429 if too many wait, 503.
        """
        served = await self._bring(request.model, arrival_s)
        try:
            begun = Begun(served, self._begin_all(served, request_id, prompts, request, arrival_s))
        except BaseException:
            self.models.let_go(served)
            raise
        self.in_flight += 1
        return begun

    async def _bring(self, name: str, arrival_s: float) -> Served:
        self.check_open()
        try:
            served = await self.models.bring(name, max(0.0, arrival_s + self._ttft_s - self.now_s()))
        except TimeoutError:
            message = f"model {name!r} is being loaded, and others are in use; send the request again"
            raise self._refused(503, message, "loading") from None
        if served is None:
            raise self._not_served(name)
        return served

    def _begin_all(
        self, served: Served, request_id: str, prompts: Sequence[Prompt], request: Common, arrival_s: float
    ) -> list[Generation]:
        self.check_open()
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
                params = sampling_params(request, max_tokens, self.defaults, prompt.structure)
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
                        command,
                        transcript,
                        prompt.structure,
                        streams=bool(request.stream),
                        scoring_only=max_tokens == 0,
                    )
                    begun.append(generation)
        except ApiError:
            for generation in begun:
                self.end(generation)
            raise
        return begun

    def finish(self, begun: Begun) -> None:
        """End all of a request that `begin` began."""
        self.in_flight -= 1
        for generation in begun.generations:
            self.end(generation)
        self.models.let_go(begun.served)

    def _begin(
        self,
        command: AddRequest,
        transcript: Transcript,
        structure: Structure | None,
        *,
        streams: bool,
        scoring_only: bool,
    ) -> Generation:
        meter = self._meter.request(command.arrival_s, command.request_id, streams=streams)
        try:
            stream = self._engine.generate(command, meter.token)
        except EngineGoneError as error:
            raise self._refused(500, f"the engine stopped: {error}", "engine_stopped") from None
        meter.placed_s = lambda: command.arrival_s if stream.prompt is None else stream.prompt.placed_s
        return Generation(stream, meter, transcript, structure, scoring_only=scoring_only)

    def end(self, generation: Generation) -> None:
        """Free the request in the engine if it runs still, and judge it."""
        generation.close()
        meter = generation.meter
        if generation.failure is not None:
            if generation.mistaken:
                meter.void()
            else:
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
