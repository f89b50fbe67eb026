"""The requests' half of an iteration: who gets a place and pages before it, and what its logits become after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coserve_engine.errors import RequestError
from coserve_engine.latency.work import make
from coserve_engine.messages import AdapterVersion, AddRequest, Event, PromptDone, RequestFailed, Token
from coserve_engine.model.executor import Executor
from coserve_engine.model.outcome import Sampled
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.serving.requests import Request, RequestTable
from coserve_engine.tensors.lora import LoraWeights


class Serving:
    """Requests of one engine. `adapters` are the versions that are loaded now."""

    def __init__(self, executor: Executor, adapters: Mapping[AdapterVersion, LoraWeights]) -> None:
        self._executor, self._adapters = executor, adapters
        self.requests = RequestTable(executor.config, executor.model, executor.ledger, executor.counts)

    def add(self, command: AddRequest, finetune_s: float) -> list[Event]:
        """Queue a request; `finetune_s` are the seconds given to finetuning so far. Says what it cannot do."""
        try:
            weights = None
            if command.adapter is not None:
                weights = self._adapters.get(command.adapter)
                if weights is None:
                    raise RequestError(
                        "unknown_adapter", f"adapter version {command.adapter} is not loaded; load it first"
                    )
            self.requests.add(command, weights, finetune_s)
        except RequestError as error:
            return [RequestFailed(command.request_id, error.code, str(error), error.field)]
        return []

    def cancel(self, request_id: str) -> None:
        self.requests.cancel(request_id)

    def make_room(self, drop_pass: Callable[[], bool], now_s: float) -> None:
        """Pages for those that run, oldest first, then for those that wait.

        Where pages run out, passes go first (`drop_pass` gives one up, or says that there is none), then the youngest
        requests. The oldest therefore always goes on, and nobody is let in while somebody is put out.
        """
        table, preempted = self.requests, False
        for request in list(table.running.values()):
            while request.slot in table.running and not table.grow(request):
                if not drop_pass():
                    table.preempt_youngest()
                    preempted = True
        if preempted:
            return
        lacking = table.admit(now_s)
        while 0 < lacking <= self._executor.ledger.held_by("pass:") and drop_pass():
            lacking = table.admit(now_s)

    def commit(
        self, segments: tuple[Segment, ...], sampled: Sampled, now: Callable[[], float]
    ) -> tuple[list[Event], tuple[Token, ...]]:
        """Take over what a forward computed: tokens, and what is reported of them."""
        running = self.requests.running
        chosen, scored = sampled.collect(self._executor.model.vocab_size)
        for kind, slot, start, length, _ in segments:
            if kind is Kind.FINETUNE:
                continue
            request = running[slot]
            if request.scored is not None:
                if start == 0:
                    request.prompt_logprobs.append(None)
                request.prompt_logprobs += scored.get(slot, ())
            self.requests.advance(request, length)
        events: list[Event] = []
        tokens: list[Token] = []
        for slot, (token, finite, reported) in zip(sampled.layout.sample_slots, chosen, strict=True):
            request = running[slot]
            if not finite:
                events.append(self._diverged(request))
                continue
            name = request.command.request_id
            if request.last_emit_s is None:
                asked = request.params.prompt_logprobs is not None
                scores = tuple(request.prompt_logprobs) if asked else None
                events.append(PromptDone(name, request.cached_tokens, scores, request.placed_s))
            at = now()
            finish = self.requests.emit(request, token, at)
            tokens.append(make(Token, (name, token, finish, at, reported)))
        return events, tuple(tokens)

    def _diverged(self, request: Request) -> RequestFailed:
        self.requests.release(request, forget=True)
        message = f"the logits are not finite; adapter version {request.command.adapter} may have diverged"
        return RequestFailed(request.command.request_id, "internal_error", message)
