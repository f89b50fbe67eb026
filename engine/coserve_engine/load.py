"""Saturation: how much of the promise the demand of inference alone would use up, whatever finetuning does in the
slack.

Finetuning fills the slack, so requests stay longer and waits look longer than they would alone. Time given to
finetuning is therefore taken out: waits lose the finetuning seconds since arrival, and by Little's law the requests
and pages held at once shrink by the share of time that finetuning took.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve_engine.cost import CostModel, ForwardWork
from coserve_engine.plan import Kind
from coserve_engine.schedule import sequence_work

SHARE_WINDOW_S = 5.0


@dataclass(slots=True)
class FinetuneTime:
    """Seconds given to finetuning, in all and as a share of the last few seconds."""

    total_s: float = 0.0
    _recent_s: float = field(default=0.0)
    _elapsed_s: float = field(default=0.0)

    def add(self, finetune_s: float, elapsed_s: float) -> None:
        keep = max(0.0, 1.0 - elapsed_s / SHARE_WINDOW_S)
        self.total_s += finetune_s
        self._recent_s = self._recent_s * keep + finetune_s
        self._elapsed_s = self._elapsed_s * keep + elapsed_s

    @property
    def share(self) -> float:
        return min(1.0, self._recent_s / self._elapsed_s) if self._elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What inference asks for now.

    Args:
        contexts: tokens in the cache of each decoding request.
        prompts: tokens still to prefill of each request that has no first token yet, in order of arrival.
        waits_s: their waits since arrival, without the time that finetuning took.
        finetune_share: share of recent time that finetuning took, 0..1.
        held_pages, total_pages: of the page pool, inference only.
    """

    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    waits_s: tuple[float, ...]
    finetune_share: float
    held_pages: int
    total_pages: int


def saturation_percent(demand: Demand, cost: CostModel, ttft_s: float, tpot_s: float, tile: int) -> float:
    """max of decode iteration / TPOT, (wait + prefill) / TTFT and pages held / pool, in percent."""
    alone = 1.0 - demand.finetune_share
    decode = ForwardWork()
    for context in demand.contexts:
        decode = decode.plus(sequence_work(Kind.DECODE, context, 1, tile))
    scaled = ForwardWork(
        decode=round(decode.decode * alone),
        calls=round(decode.calls * alone),
        kv_rows=round(decode.kv_rows * alone),
        pairs=round(decode.pairs * alone),
    )
    first_token, queued = 0.0, 0.0
    for prompt, wait in zip(demand.prompts, demand.waits_s, strict=True):
        queued += cost.forward_s(sequence_work(Kind.PREFILL, 0, prompt, tile))
        first_token = max(first_token, wait + queued)
    pages = demand.held_pages * alone / demand.total_pages
    return 100.0 * max(cost.forward_s(scaled) / tpot_s, first_token / ttft_s, pages)
