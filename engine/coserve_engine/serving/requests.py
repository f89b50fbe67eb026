"""Requests inside the engine: waiting for a place, then running with pages that grow as they do.

First come, first served: whoever runs came before whoever waits. A request starts with the pages of its tokens, those
that another one computed included, and takes one more when it has filled them. The youngest gives all of its back
when there are none left; it waits first in line and is computed again, which changes no bit of what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from coserve_engine.config import EngineConfig, ModelConfig
from coserve_engine.errors import OutOfPagesError, RequestError
from coserve_engine.grammar.matching import Matching
from coserve_engine.latency.work import make
from coserve_engine.layout.choices import Choice, Seen
from coserve_engine.limits import check
from coserve_engine.messages import AddRequest, FinishReason, SamplingParams, TokenLogprobs
from coserve_engine.scheduler.load import RequestLoad
from coserve_engine.scheduler.pages import HEADROOM_PAGES, PageLedger
from coserve_engine.scheduler.plan import SequenceView
from coserve_engine.serving.prefix import KeyChain
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.lora import LoraWeights


@dataclass(slots=True)
class Request:
    """A request and what it holds. `tokens` are prompt and output; the first `done` are in the KV cache, or will be
    when what was launched is over. A token that the host does not know yet is negative: -1 - n stands for the n-th
    that the last forward chose.
    """

    command: AddRequest
    slot: int
    weights: LoraWeights | None
    finetune_s_at_arrival: float
    tokens: list[int]
    chain: KeyChain
    enders: tuple[int, ...]
    """Tokens that would end it."""
    counted: tuple[int, int] | None = None
    """While it runs, if a penalty asks: where its tokens are counted, and how many of its prompt's differ."""
    pages: tuple[int, ...] = ()
    done: int = 0
    registered: int = 0
    """Its first pages, which can be found by their keys or need not be."""
    finite: bool = False
    """Whether its logits were seen to be finite; what an adapter computes may not be."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache when it first started."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    placed_s: float = 0.0
    """When it got its first place."""
    last_emit_s: float | None = None
    expected_s: float = 0.0
    """When a token that the host does not know yet is expected."""
    starts: int = 0
    """How often it got a place: what was launched before it was put out is not its own any more."""
    matching: Matching | None = None
    """Where its answer stands in its grammar, if it has one."""
    failed: RequestError | None = None
    """Why its answer cannot go on."""

    @property
    def owner(self) -> str:
        """Its name in the page ledger."""
        return f"request:{self.slot}"

    @property
    def params(self) -> SamplingParams:
        return self.command.params

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on how often it was seen."""
        p = self.params
        return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.command.prompt)

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are wanted beside those of its prompt; None where no log-probabilities are,
        or all are there.
        """
        return None if self.last_emit_s is not None else self.params.prompt_logprobs

    def view(self, ttft_s: float, tpot_s: float) -> SequenceView:
        """As a policy sees it; the promise is its own where it brings one."""
        c = self.command
        promise = c.ttft_s or ttft_s, c.tpot_s or tpot_s
        last_s = self.expected_s if self.tokens[-1] < 0 else self.last_emit_s
        return SequenceView.of(self.slot, self.done, len(self.tokens), c.arrival_s, last_s, *promise)

    @property
    def ending(self) -> bool:
        """Whether it ends with the token that is on its way."""
        return self.tokens[-1] < 0 and self.output_tokens >= self.params.max_tokens

    def forget_unknown(self) -> None:
        """Drop tokens that the host does not know: they will be chosen again, and be the same."""
        while self.tokens[-1] < 0:
            self.tokens.pop()

    @property
    def adapter(self) -> int | None:
        """An id that requests of one adapter share, whatever its version is called."""
        return None if self.weights is None else id(self.weights)

    @property
    def adapter_order(self) -> tuple[str, int]:
        """Sorts requests by adapter version, those without one first."""
        adapter = self.command.adapter
        return ("", 0) if adapter is None else (adapter.uid, adapter.number)

    def load(self) -> RequestLoad:
        """As saturation sees it."""
        first = self.last_emit_s is None
        return RequestLoad(self.done, len(self.tokens), first, self.command.arrival_s, self.finetune_s_at_arrival)

    def choice(self) -> Choice:
        """How its next token is chosen."""
        params, length = self.command.params, len(self.tokens)
        output = length - len(self.command.prompt)
        early = output < params.min_tokens and self.matching is None  # a grammar says itself where an answer may end
        banned, seen = self.enders if early else (), None
        if self.counted is not None:
            place, first = self.counted
            seen = Seen(place, first + output)
        return make(Choice, (params, length, banned, seen))


class Computed(NamedTuple):
    """What a forward computes of a request, which had `starts` then: its tokens up to `end`, and the one at `place`."""

    request: Request
    starts: int
    end: int
    place: int | None


class RequestTable:
    """Waiting and running requests, and their pages. `running` is in order of arrival, as `waiting` is behind it."""

    def __init__(self, config: EngineConfig, model: ModelConfig, ledger: PageLedger, counts: TokenCounts) -> None:
        self._config, self._model, self._ledger, self._counts = config, model, ledger, counts
        self._slots = 0
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._computing: dict[bytes, int] = {}
        """Keys of pages that a running request is going to fill, and its slot."""
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0

    def views(self, ttft_s: float, tpot_s: float) -> tuple[SequenceView, ...]:
        """The running requests as a policy sees them; those of one adapter follow each other, as will their rows."""
        by_adapter = sorted(self.running.values(), key=lambda request: request.adapter_order)
        return tuple(request.view(ttft_s, tpot_s) for request in by_adapter if not request.ending)

    def check(self, command: AddRequest, others: Collection[str] = ()) -> None:
        """Whether a request may be added, where `others` will be before.

        Raises:
            RequestError: it can never run here, its id is taken, or too many wait.
        """
        if self._find(command.request_id) is not None or command.request_id in others:
            raise RequestError(
                "duplicate_request",
                f"request_id is {command.request_id!r}, which a request has that is not done yet; take another",
            )
        check(command, self._model.vocab_size, self._config.max_model_length)
        prompt, params, numerics = command.prompt, command.params, self._config.numerics
        need = numerics.pages(len(prompt) + params.max_tokens)
        if need > self._ledger.total:
            raise RequestError(
                "context_length_exceeded",
                f"the request needs {need} KV pages and the pool has {self._ledger.total}; shorten the prompt or lower "
                "max_tokens",
            )
        if len(self.waiting) + len(others) >= self._config.max_waiting:
            raise RequestError(
                "overloaded", f"{self._config.max_waiting} requests are waiting already; try again later"
            )

    def add(
        self, command: AddRequest, weights: LoraWeights | None, finetune_s: float, matching: Matching | None = None
    ) -> None:
        """Queue a request that was checked."""
        self._slots += 1
        load = 0 if weights is None else weights.load
        chain = KeyChain(command.adapter, self._config.numerics.page, load)
        request = Request(
            command, self._slots, weights, finetune_s, list(command.prompt), chain, self._enders(command.params)
        )
        request.matching = matching
        self.waiting.append(request)

    def _enders(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self._model.eos_token_ids)

    def grow(self, request: Request) -> bool:
        """Pages for all that a running request knows; False where there are none."""
        lacking = self._config.numerics.pages(len(request.tokens)) - len(request.pages)
        if lacking > 0 and not request.ending:
            try:
                request.pages += self._ledger.extend(request.owner, lacking)
            except OutOfPagesError:
                return False
        return True

    def preempt_youngest(self) -> None:
        """Its pages are free and it waits first in line. What it computed may stay in the cache for a while."""
        request = next(reversed(self.running.values()))
        self.release(request)
        request.forget_unknown()
        request.pages, request.done, request.registered = (), 0, 0
        request.prompt_logprobs.clear()
        self.waiting.appendleft(request)
        self.preemptions += 1

    def admit(self, now_s: float) -> int:
        """Start waiting requests while places and pages last.

        One whose next page is being computed by another waits for it: prompts are computed first come, first served,
        so it would not come sooner by computing the page again.

        Returns the pages that the first one left lacks, 0 if none.
        """
        while self.waiting and len(self.running) < self._config.places:
            request = self.waiting[0]
            hits, comes_soon = self._look_up(request)
            if comes_soon:
                return 0
            try:
                self._start(request, hits, now_s)
            except OutOfPagesError as error:
                return error.lacking
            self.waiting.popleft()
            self.running[request.slot] = request
            self._leave_headroom()
        return 0

    def _look_up(self, request: Request) -> tuple[tuple[int, ...], bool]:
        """Pages that a request can begin with, and whether the one after them is being computed."""
        length = len(request.tokens)
        request.chain.extend(request.tokens, length)
        if request.scored is not None:
            return (), False
        keys = request.chain.keys[: (length - 1) // self._config.numerics.page]  # the last token must be computed
        hits = self._ledger.match(keys)
        return hits, len(hits) < len(keys) and keys[len(hits)] in self._computing

    def _start(self, request: Request, hits: tuple[int, ...], now_s: float) -> None:
        page, length = self._config.numerics.page, len(request.tokens)
        request.pages = self._ledger.reserve(
            request.owner, self._config.numerics.pages(length), hits, tainted=request.weights is not None
        )
        request.registered, request.done = len(hits), len(hits) * page
        request.starts += 1
        if request.penalised:
            prompt = len(request.command.prompt)
            prompt_tokens, output = request.tokens[:prompt], request.tokens[prompt:]
            request.counted = self._counts.take(prompt_tokens, output, request.params.max_tokens)
        for key in request.chain.keys[len(hits) :]:
            self._computing.setdefault(key, request.slot)
        if request.last_emit_s is None:
            request.cached_tokens, request.placed_s = request.done, request.placed_s or now_s
            self.prefix_queries += length
            self.prefix_hits += request.done

    def cancel(self, request_id: str) -> None:
        """Forget a request in whatever state it is."""
        request = self._find(request_id)
        if request is None:
            return
        if request.slot in self.running:
            self.release(request)
        else:
            self.waiting.remove(request)

    def _find(self, request_id: str) -> Request | None:
        known = (*self.waiting, *self.running.values())
        return next((request for request in known if request.command.request_id == request_id), None)

    def launched(self, request: Request, end: int, chosen: int | None, expected_s: float) -> Computed:
        """The tokens of a running request up to `end` will be in the cache; `chosen`: which of the tokens that this
        forward chooses, about `expected_s`, is its next, if any is.
        """
        request.done = end
        place = None
        if chosen is not None:
            place, request.expected_s = len(request.tokens), expected_s
            request.tokens.append(-1 - chosen)
        return Computed(request, request.starts, end, place)

    def current(self, computed: Computed) -> bool:
        """Whether the request still runs, and was not put out in between."""
        request = computed.request
        return request.starts == computed.starts and self.running.get(request.slot) is request

    def advance(self, request: Request, end: int) -> None:
        """The first `end` tokens of a running request are in the cache, and known."""
        if request.weights is None or request.finite:
            self._register(request, end)

    def _register(self, request: Request, end: int) -> None:
        """Let others find the pages that are full. Those of an adapter that may have diverged are not offered."""
        full = end // self._config.numerics.page
        if request.registered < full:
            request.chain.extend(request.tokens, end)
            self._not_computing(request, full)
            for index in range(request.registered, full):
                self._ledger.register(request.pages[index], request.chain.keys[index])
            request.registered = full

    def _not_computing(self, request: Request, end: int) -> None:
        """Its pages up to `end` are done or given up."""
        for key in request.chain.keys[request.registered : end]:
            if self._computing.get(key) == request.slot:
                del self._computing[key]

    def emit(self, computed: Computed, token: int, now: float) -> FinishReason | None:
        """A running request's token is known; a finished request is released."""
        request, place = computed.request, computed.place
        assert place is not None  # or there is no token
        request.tokens[place] = token
        request.last_emit_s = now
        if not request.finite:
            request.finite = True
            self._register(request, computed.end)
        params, finish = request.command.params, None
        if token in request.enders or (request.matching is not None and token in self._model.eos_token_ids):
            finish = FinishReason.STOP
        elif place + 1 - len(request.command.prompt) >= params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self.release(request)
        return finish

    def release(self, request: Request, *, forget: bool = False) -> None:
        """Take a running request's place and pages; `forget` what it computed where that is of no use."""
        del self.running[request.slot]
        self._not_computing(request, len(request.chain.keys))
        self._ledger.free(request.owner, forget=forget)
        if request.counted is not None:
            self._counts.give(request.counted[0])
            request.counted = None
        self._leave_headroom()

    def _leave_headroom(self) -> None:
        self._ledger.headroom = HEADROOM_PAGES * len(self.running)
