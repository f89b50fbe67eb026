"""Saturation: how much of the promise the demand of inference alone would use up, whatever finetuning does in the
slack.

Finetuning fills the slack, so requests stay longer and waits look longer than they would alone. Time given to
finetuning is therefore taken out: waits lose the finetuning seconds since arrival, and the number of requests that
decode at once, with the pages they hold, is scaled to what it would be alone (`alone`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import Reaches, decode_work, prefill_work

SHARE_WINDOW_S = 5.0


@dataclass(slots=True)
class ServingTime:
    """Seconds given to finetuning, in all, and of the last busy seconds the share that it took.

    Only iterations that serve count for the share: nobody stays longer for what is done while nobody is here.
    """

    finetune_s: float = 0.0
    _recent_s: float = 0.0
    _prefill_s: float = 0.0
    _elapsed_s: float = 0.0

    def add(self, finetune_s: float, prefill_s: float, elapsed_s: float, *, busy: bool) -> None:
        """Count an iteration, its turnaround included in `elapsed_s`."""
        self.finetune_s += finetune_s
        if busy:
            keep = max(0.0, 1.0 - elapsed_s / SHARE_WINDOW_S)
            self._recent_s = self._recent_s * keep + finetune_s
            self._prefill_s = self._prefill_s * keep + prefill_s
            self._elapsed_s = self._elapsed_s * keep + elapsed_s

    @property
    def share(self) -> float:
        """Of the time between tokens that prompts did not take, the share that finetuning took, 0..1."""
        free_s = self._elapsed_s - self._prefill_s
        return min(1.0, self._recent_s / free_s) if free_s > 0 else 0.0


class RequestLoad(NamedTuple):
    """A request, running or waiting: `done` of its `known` tokens are in the cache, `first` while it has no first
    token; `finetune_s` were given to finetuning when it arrived.
    """

    done: int
    known: int
    first: bool
    arrival_s: float
    finetune_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What inference asks for now.

    Args:
        contexts: tokens in the cache of each decoding request; of one that was put out, those it will have there again.
        prompts: tokens to compute before the next token of each request that does not decode, in order of arrival.
        waits_s: their waits for a first token since arrival, without the time that finetuning took.
        finetune_share: `ServingTime.share`.
        held_pages, total_pages: of the page pool, inference only.
    """

    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    waits_s: tuple[float, ...]
    finetune_share: float
    held_pages: int
    total_pages: int

    @classmethod
    def of(
        cls, requests: Iterable[RequestLoad], now: float, time: ServingTime, held_pages: int, total_pages: int
    ) -> Demand:
        """Of `requests` that run or wait, in order of arrival."""
        contexts, prompts, waits_s = [], [], []
        for done, known, first, arrival_s, finetune_s in requests:
            if not first:
                contexts.append(known - 1)
            if first or known - done > 1:
                prompts.append(known - done)
                waits_s.append(max(0.0, now - arrival_s - (time.finetune_s - finetune_s)) if first else 0.0)
        return cls(tuple(contexts), tuple(prompts), tuple(waits_s), time.share, held_pages, total_pages)


def alone(count: int, fixed_s: float, rows_s: float, finetune_share: float) -> float:
    """How many of `count` decoding requests would be here without finetuning.

    By Little's law their number goes with the time between two tokens: T(n) = fixed_s + rows_s alone, T(n) / (1 - s)
    with finetuning. Alone fewer are here, and each iteration is shorter, so n' is the fixed point of
    n' = n (1 - s) T(n') / T(n), where an iteration has at least one row. Of iterations that are predicted to take no
    time nothing is known.
    """
    if count == 0 or finetune_share == 0 or fixed_s + rows_s <= 0:
        return count
    left = 1.0 - finetune_share
    found = count * left * fixed_s / (fixed_s + finetune_share * rows_s) if fixed_s > 0 else 0.0
    if found < 1.0:
        found = min(1.0, count * left * (fixed_s + rows_s / count) / (fixed_s + rows_s))
    return min(float(count), found)


def saturation_percent(
    demand: Demand, cost: CostModel, ttft_s: float, tpot_s: float, tile: int, reaches: Reaches = ()
) -> float:
    """max of decode iteration / TPOT, (wait + prefill) / TTFT and pages held / pool, in percent.

    Less than one request is one for a part of the time, and the fixed part of an iteration counts for that part.
    """
    decode_s, scale = 0.0, 1.0 - demand.finetune_share
    if demand.contexts:
        count = len(demand.contexts)
        decode = decode_work(list(demand.contexts), tile, reaches)
        rows_s = cost.forward_s(decode.plus(decode)) - cost.forward_s(decode)
        fixed_s = max(0.0, cost.forward_s(decode) - rows_s)
        requests = alone(count, fixed_s, rows_s, demand.finetune_share)
        scale = requests / count
        decode_s = fixed_s * min(1.0, requests) + rows_s * scale
    first_token_s, queued_s = 0.0, 0.0
    for prompt, wait_s in zip(demand.prompts, demand.waits_s, strict=True):
        queued_s += cost.forward_s(prefill_work(0, prompt, tile, reaches))
        first_token_s = max(first_token_s, wait_s + queued_s)
    pages = demand.held_pages * scale / demand.total_pages
    return 100.0 * max(decode_s / tpot_s, first_token_s / ttft_s, pages)
