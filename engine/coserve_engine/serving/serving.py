"""The requests' half of an iteration: who gets a place and pages before it, and what its logits become after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coserve_engine.errors import RequestError
from coserve_engine.latency.work import make
from coserve_engine.messages import AdapterVersion, AddRequest, Event, PromptDone, RequestFailed, Token
from coserve_engine.model.executor import Executor
from coserve_engine.model.outcome import Sampled
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.serving.requests import Computed, Request, RequestTable
from coserve_engine.tensors.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Flight:
    """What a forward that was enqueued computes of requests, and what will come of it."""

    rows: tuple[Computed, ...]
    sampled: Sampled


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

    def launched(self, segments: tuple[Segment, ...], expected_s: float) -> tuple[Computed, ...]:
        """A forward of `segments`, whose batch is bound, will be through about `expected_s`: what it computes of
        requests.
        """
        rows: list[Computed] = []
        samples = 0
        for kind, slot, start, length, sample in segments:
            if kind is Kind.FINETUNE:
                continue
            chosen = samples if sample else None
            rows.append(self.requests.launched(self.requests.running[slot], start + length, chosen, expected_s))
            samples += sample
        return tuple(rows)

    def commit(self, flight: Flight, now: Callable[[], float]) -> tuple[list[Event], tuple[Token, ...]]:
        """Take over what a forward computed: tokens, and what is reported of them. What it computed of requests that
        are gone is of no use.
        """
        table = self.requests
        chosen, scored = flight.sampled.collect(self._executor.model.vocab_size)
        current = [row for row in flight.rows if table.current(row)]
        for row in current:
            request = row.request
            if request.scored is not None:
                if not request.prompt_logprobs:
                    request.prompt_logprobs.append(None)
                request.prompt_logprobs += scored.get(request.slot, ())
            table.advance(request, row.end)
        events: list[Event] = []
        tokens: list[Token] = []
        of_slot = dict(zip(flight.sampled.layout.sample_slots, chosen, strict=True))
        for row in current:
            if row.place is None:
                continue
            request, (token, finite, reported) = row.request, of_slot[row.request.slot]
            if not finite:
                events.append(self._diverged(request))
                continue
            name = request.command.request_id
            if request.last_emit_s is None:
                asked = request.params.prompt_logprobs is not None
                scores = tuple(request.prompt_logprobs) if asked else None
                events.append(PromptDone(name, request.cached_tokens, scores, request.placed_s))
            at = now()
            finish = table.emit(row, token, at)
            tokens.append(make(Token, (name, token, finish, at, reported)))
        return events, tuple(tokens)

    def _diverged(self, request: Request) -> RequestFailed:
        self.requests.release(request, forget=True)
        message = f"the logits are not finite; adapter version {request.command.adapter} may have diverged"
        return RequestFailed(request.command.request_id, "internal_error", message)
