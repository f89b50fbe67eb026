"""Requests inside the engine: waiting for a place, then running with all their pages reserved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coserve_engine.batch import SequenceRows
from coserve_engine.config import EngineConfig, ModelConfig
from coserve_engine.errors import OutOfPagesError, RequestError
from coserve_engine.lora import LoraWeights
from coserve_engine.messages import AddRequest, FinishReason, Token
from coserve_engine.pages import PageLedger
from coserve_engine.plan import SequenceView


@dataclass(slots=True)
class Request:
    """A request and what it holds. `tokens` are prompt and output; the first `done` are in the KV cache."""

    command: AddRequest
    slot: int
    weights: LoraWeights | None
    finetune_s_at_arrival: float
    tokens: list[int] = field(default_factory=list)
    pages: tuple[int, ...] = ()
    done: int = 0
    last_emit_s: float | None = None

    @property
    def owner(self) -> str:
        """Its name in the page ledger."""
        return f"request:{self.slot}"

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.command.prompt)

    def view(self, ttft_s: float, tpot_s: float) -> SequenceView:
        arrival = self.command.arrival_s
        deadline = arrival + ttft_s if self.last_emit_s is None else self.last_emit_s + tpot_s
        return SequenceView(self.slot, self.done, len(self.tokens), deadline, arrival)

    def rows(self) -> SequenceRows:
        return SequenceRows(self.tokens, self.pages, self.weights)


class RequestTable:
    """Waiting and running requests; first come, first served.

    Pages for prompt and output are reserved whole at admission.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        ledger: PageLedger,
        scrub: Callable[[tuple[int, ...]], None],
    ) -> None:
        self._config, self._model, self._ledger, self._scrub = config, model, ledger, scrub
        self._slots = 0
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}

    def add(self, command: AddRequest, weights: LoraWeights | None, finetune_s: float) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never run here.
        """
        prompt, limit = len(command.prompt), self._config.max_model_length
        if prompt == 0:
            raise RequestError("invalid_token", "the prompt has no tokens; send at least one")
        if command.params.max_tokens < 1:
            raise RequestError("invalid_token", f"max_tokens is {command.params.max_tokens}; it must be at least 1")
        if prompt + command.params.max_tokens > limit:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {prompt} tokens and max_tokens is {command.params.max_tokens}, together more than the "
                f"context of {limit}; shorten the prompt or lower max_tokens",
            )
        if not 0 <= min(command.prompt) <= max(command.prompt) < self._model.vocab_size:
            raise RequestError(
                "invalid_token", f"the prompt has a token outside the vocabulary of {self._model.vocab_size}"
            )
        self._slots += 1
        request = Request(command, self._slots, weights, finetune_s, list(command.prompt))
        if self._pages(request) > self._ledger.total:
            raise RequestError(
                "context_length_exceeded",
                f"the request needs {self._pages(request)} KV pages; the pool has {self._ledger.total}",
            )
        self.waiting.append(request)

    def _pages(self, request: Request) -> int:
        length = len(request.command.prompt) + request.command.params.max_tokens
        return self._config.numerics.pages(length)

    def admit(self) -> int:
        """Start waiting requests while places and pages last.

        Returns the pages that the first one left lacks, 0 if none.
        """
        while self.waiting and len(self.running) < self._config.max_requests:
            request = self.waiting[0]
            need = self._pages(request)
            try:
                request.pages = self._ledger.reserve(request.owner, need)
            except OutOfPagesError:
                return need - self._ledger.free_pages
            self.waiting.popleft()
            self.running[request.slot] = request
        return 0

    def cancel(self, request_id: str) -> None:
        for request in self.waiting:
            if request.command.request_id == request_id:
                self.waiting.remove(request)
                return
        for request in self.running.values():
            if request.command.request_id == request_id:
                self.release(request)
                return

    def advance(self, slot: int, rows: int) -> None:
        """`rows` more tokens of a running request are in the cache."""
        self.running[slot].done += rows

    def emit(self, slot: int, token: int, now: float) -> Token:
        """Append a sampled token; a finished request is released."""
        request = self.running[slot]
        request.tokens.append(token)
        request.last_emit_s = now
        params = request.command.params
        finish = None
        if token in params.stop_token_ids or (token in self._model.eos_token_ids and not params.ignore_eos):
            finish = FinishReason.STOP
        elif request.output_tokens >= params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self.release(request)
        return Token(request.command.request_id, token, finish, now)

    def release(self, request: Request) -> None:
        """Take a running request's place and pages. An adapter may have left values there that are not finite."""
        del self.running[request.slot]
        if request.weights is not None:
            self._scrub(request.pages)
        self._ledger.free(request.owner)

    def rows(self) -> Mapping[int, SequenceRows]:
        return {slot: request.rows() for slot, request in self.running.items()}
