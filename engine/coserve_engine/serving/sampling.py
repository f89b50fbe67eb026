"""Choosing tokens, all rows of an iteration at once; a row's choice depends on that row alone.

Randomness is addressed, not drawn: (seed, position) names the number, so a replay chooses the same token. A token is
found by inverting the distribution's sum: over the vocabulary as it is where nothing is cut off, else over the
likeliest tokens in order. Sorting a vocabulary takes longer than all the rest, so the likeliest CANDIDATES are tried
first, then more of them; only a row that is nearly flat is sorted whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from coserve_engine.messages import SamplingParams
from coserve_engine.numerics import repeat_last
from coserve_engine.serving.processors import Processors, process

CANDIDATES = 256
GREEDY_BELOW = 1e-5
"""Temperatures below are 0, as in vLLM: dividing by them would overflow."""
ROWS = 4
"""Rows are padded to a multiple: the sum of a lone row may be split over threads, and then has other bits."""
_MASK = (1 << 64) - 1


class Choice(NamedTuple):
    """What a row's choice depends on besides its logits. `position` is that of the token to choose."""

    params: SamplingParams
    position: int
    processors: Processors | None = None


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Which rows of logits [N, vocab] hold finite numbers only."""
    highest, lowest = logits.amax(-1), logits.amin(-1)  # a NaN is both
    return (highest.isfinite() & lowest.isfinite()).tolist()


def sample_u(seed: int, position: int) -> float:
    """A number in [0, 1) for a request's seed and the position of the token (SplitMix64, Steele et al.

    2014, two rounds).
    """

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    return (mix(mix(seed & _MASK) ^ position) >> 11) * 2.0**-53


def choose(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """A token for each row of logits [N, vocab]."""
    scores = process(logits, [(row, c.processors) for row, c in enumerate(choices) if c.processors is not None])
    tokens: list[int] = scores.argmax(-1).tolist()
    drawn = [row for row, choice in enumerate(choices) if choice.params.temperature >= GREEDY_BELOW]
    if drawn:
        for row, token in zip(drawn, _draw(scores, drawn, choices), strict=True):
            tokens[row] = token
    return tokens


def _draw(scores: torch.Tensor, rows: list[int], choices: Sequence[Choice]) -> list[int]:
    def column(values: list[float]) -> torch.Tensor:
        """[rows, 1], padded as the rows are."""
        return torch.tensor(repeat_last(values, ROWS), dtype=torch.float64, device=scores.device).unsqueeze(1)

    params = [choices[row].params for row in rows]
    u = column([sample_u(choices[row].params.seed, choices[row].position) for row in rows])
    index = torch.tensor(repeat_last(rows, ROWS), device=scores.device)
    p = torch.softmax(scores[index] / column([one.temperature for one in params]).to(scores.dtype), -1)
    if any(one.min_p > 0 for one in params):
        floor = column([one.min_p for one in params]).to(p.dtype) * p.amax(-1, keepdim=True)
        p = p.where(p >= floor, 0.0)
    vocab = scores.shape[1]
    tokens = [0] * len(rows)
    cut = [n for n, one in enumerate(params) if 0 < one.top_k < vocab or one.top_p < 1]
    whole = sorted(set(range(len(rows))) - set(cut))
    if whole:
        some = repeat_last(whole, ROWS)
        mass = p[some].cumsum(-1, dtype=torch.float64)
        found = torch.searchsorted(mass, u[some] * mass[:, -1:], right=True).clamp_(max=vocab - 1).squeeze(1)
        for n, token in zip(whole, found.tolist(), strict=False):
            tokens[n] = token
    width = min(CANDIDATES, vocab)
    while cut:
        some = repeat_last(cut, ROWS)
        top_k = column([float(one.top_k) if one.top_k > 0 else float(vocab) for one in params])[some]
        top_p = column([one.top_p for one in params])[some]
        found, decided = _among_likeliest(p[some], width, top_k, top_p, u[some])
        for n, token in zip(cut, found.tolist(), strict=False):
            tokens[n] = token
        cut = [n for n, done in zip(cut, decided.tolist(), strict=False) if not done]
        width = min(16 * width, vocab)
    return tokens


def _among_likeliest(
    p: torch.Tensor, width: int, top_k: torch.Tensor, top_p: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from what top_k [N, 1] and then top_p [N, 1] leave of p [N, vocab] at u [N, 1].

    Only the `width` likeliest are looked at. Returns tokens [N], and whether that decided each [N].
    """
    if width == p.shape[1]:
        values, order = p.sort(descending=True, stable=True)
    else:
        values, order = p.topk(width)
    ranks = torch.arange(width, device=p.device)
    mass = values.cumsum(-1, dtype=torch.float64)
    within = top_k <= width
    last_rank = top_k.clamp(max=width).long() - 1
    total = torch.where(top_k < p.shape[1], mass.gather(1, last_rank), p.sum(-1, keepdim=True, dtype=torch.float64))
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], 1)
    kept = ((before < top_p * total) & (ranks < top_k)).sum(-1, keepdim=True).clamp_(min=1)
    nucleus_within = (top_k >= p.shape[1]) & (mass[:, -1:] >= top_p * total)
    decided = within | nucleus_within if width < p.shape[1] else torch.ones_like(within)
    target = u * mass.gather(1, kept - 1)
    place = torch.searchsorted(mass, target, right=True).minimum(kept - 1)
    return order.gather(1, place).squeeze(1), decided.squeeze(1)
