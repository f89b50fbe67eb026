"""The requests' half of an iteration: who gets a place and pages before it, and what its logits become after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coserve_engine.errors import RequestError
from coserve_engine.grammar.compiler import Compiler
from coserve_engine.latency.work import make
from coserve_engine.layout.masks import ALL, TokenMasks, words
from coserve_engine.messages import AdapterVersion, AddRequest, Event, PromptDone, RequestFailed, Token
from coserve_engine.model.executor import Executor
from coserve_engine.model.outcome import Sampled
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.serving.compiling import CompilingRequests
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
        model = executor.model
        self.compiler = Compiler(Path(executor.config.model_path), model.vocab_size, model.eos_token_ids)
        self.compiling = CompilingRequests(self.compiler)

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
            self.requests.check(command, self.compiling.waiting)
            grammar = command.params.grammar
            if grammar is None:
                self.requests.add(command, weights, finetune_s)
            else:
                self.compiling.add(command, weights, finetune_s, grammar)
        except RequestError as error:
            return [_failed(command.request_id, error)]
        return []

    def cancel(self, request_id: str) -> None:
        self.compiling.cancel(request_id)
        self.requests.cancel(request_id)

    def collect(self) -> list[Event]:
        """Requests whose grammars were compiled wait behind those that do, from now on."""
        events: list[Event] = []
        for one in self.compiling.collect():
            try:
                matching = one.matching(self.compiler)
            except RequestError as error:
                events.append(_failed(one.command.request_id, error))
            else:
                self.requests.add(one.command, one.weights, one.finetune_s, matching)
        return events

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

    def known(self, rows: tuple[Computed, ...]) -> bool:
        """Whether the host knows all tokens of the answers that are held to a grammar."""
        return all(row.request.tokens[place - 1] >= 0 for _, row, place in self._held(rows))

    def masks(self, rows: tuple[Computed, ...]) -> TokenMasks | None:
        """What the next tokens of these rows may be, where a grammar says so; to be called when all before are known.
        An answer that cannot go on may be anything: its request fails when that is there.
        """
        held = self._held(rows)
        if not held:
            return None
        bits = np.empty((len(held), words(self._executor.model.vocab_size)), np.int32)
        for mask, (_, row, place) in zip(bits, held, strict=True):
            request, prompt = row.request, len(row.request.command.prompt)
            assert request.matching is not None  # it is held to it
            ends = request.enders if place - prompt >= request.params.min_tokens else ()
            try:
                request.matching.fill(mask, request.tokens[prompt:place], ends)
            except RequestError as error:
                request.failed = error
                mask.fill(ALL)
        return TokenMasks([n for n, _, _ in held], bits)

    def _held(self, rows: tuple[Computed, ...]) -> list[tuple[int, Computed, int]]:
        """Of the rows that sample those of running requests with a grammar: which it is, and its token's place."""
        sampling = ((row, row.place) for row in rows if row.place is not None)
        return [
            (n, row, place)
            for n, (row, place) in enumerate(sampling)
            if row.request.matching is not None and self.requests.current(row)
        ]

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
            if request.failed is not None:
                self.requests.release(request)
                events.append(_failed(request.command.request_id, request.failed))
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


def _failed(request_id: str, error: RequestError) -> RequestFailed:
    return RequestFailed(request_id, error.code, str(error), error.field)
