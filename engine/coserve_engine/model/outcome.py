"""What requests get of a forward: tokens, whether their logits are finite, log-probabilities. All of it is one row of
numbers, fetched at once.

Log-probabilities to report come from the model's own distribution, by the word (`Kernels.log_probabilities`) that has
the bits of training's, over rows that are the same bits, so the two agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from coserve_engine.device.protocol import Pending
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.messages import MAX_LOGPROBS, TokenLogprobs

SCORED_ROWS = 64
"""Rows of a prompt whose [rows, vocab] exist at once."""


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Which rows of logits [N, vocab] hold finite numbers only: bool [N]."""
    highest, lowest = logits.amax(-1), logits.amin(-1)  # a NaN is both
    return highest.isfinite() & lowest.isfinite()


def report(logp: torch.Tensor, tokens: torch.Tensor, *, tops: bool) -> torch.Tensor:
    """Of log-probabilities [N, vocab] those of `tokens` [N], their ranks and, with `tops`, the likeliest tokens and
    theirs: float64 [N * (2 + 2 * count)], row by row.
    """
    picked = logp.gather(1, tokens.unsqueeze(1))
    parts = [picked.double(), (logp >= picked).sum(1, keepdim=True).double()]
    if tops:
        best = logp.topk(_likeliest(logp.shape[1]))  # as many for each: ties must not fall as a neighbour wants
        parts += [best.indices.double(), best.values.double()]
    return torch.cat(parts, 1).flatten()


def _likeliest(vocab: int) -> int:
    return min(MAX_LOGPROBS, vocab)


class Chosen(NamedTuple):
    """A token, whether its row's logits are finite, and what is to be reported of it."""

    token: int
    finite: bool
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came, or will come, of a forward of `layout`; nothing where nobody gets anything."""

    layout: BatchLayout
    pending: Pending | None

    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return self.pending is None or self.pending.ready()

    def collect(self, vocab: int) -> tuple[tuple[Chosen, ...], Mapping[int, tuple[TokenLogprobs, ...]]]:
        """Of the layout's `sample_slots` one each; and by slot, of its `scored`, what each target has."""
        if self.pending is None:
            return (), {}
        numbers = iter(self.pending.get())
        slots, choices = self.layout.sample_slots, self.layout.choices
        tokens = [int(token) for token in islice(numbers, len(slots))]
        finite = [bool(one) for one in islice(numbers, len(slots))]
        tops = any(choice.params.logprobs for choice in choices)
        wanted = [choice.params.logprobs for choice in choices]
        reported = [None if top is None else _read(numbers, vocab if tops else 0, top) for top in wanted]
        chosen = tuple(map(Chosen, tokens, finite, reported))
        scored = {
            slot: tuple([_read(numbers, vocab if top else 0, top) for _ in targets])
            for slot, _, targets, top in self.layout.scored
        }
        return chosen, scored


def _read(numbers: Iterator[float], vocab: int, top: int) -> TokenLogprobs:
    """One row of a `report` with the likeliest of so many tokens (0: without them), of which `top` are wanted."""
    value, rank, count = next(numbers), int(next(numbers)), _likeliest(vocab)
    ids, values = list(islice(numbers, count)), list(islice(numbers, count))
    return TokenLogprobs(value, rank, tuple(zip(map(int, ids[:top]), values[:top], strict=True)))
