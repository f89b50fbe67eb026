"""Choosing tokens, all rows of an iteration at once; a row's choice depends on that row alone.

Randomness is addressed, not drawn: (seed, position) names the number, so a replay chooses the same token. A token is
found by inverting the sum over those that may be drawn, in the order of their ids. Where these end is told by the last
value that top_k and top_p keep, and by how many of the tokens that have it, the lower ids first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.layout.choices import ROWS, ChoiceLayout
from coserve_engine.numerics import repeat_last
from coserve_engine.tensors.counts import ONCE_MORE, TokenCounts

CANDIDATES = 256

Draw = Callable[[torch.Tensor, "BoundChoices", torch.Tensor], torch.Tensor]
"""(p [D, vocab] of the drawn rows, choices, u [D, 1]) -> tokens [D]; any of the vocabulary where p is not finite."""


@dataclass(frozen=True, slots=True)
class BoundChoices:
    """A ChoiceLayout of N rows as tensors: D rows are drawn, columns of these are [D, 1]; P rows have penalties."""

    layout: ChoiceLayout
    staged: Staged
    at: dict[str, slice]

    @classmethod
    def put(cls, layout: ChoiceLayout, columns: Columns) -> Callable[[Staged], BoundChoices]:
        """Put them among what will be staged; to be called with that."""
        rows, places, lengths, *penalties = layout.penalties
        ints = {
            "penalised": rows,
            "places": places,
            "lengths": lengths,
            "biased_rows": layout.biased.rows,
            "biased": layout.biased.tokens,
            "banned_rows": layout.banned.rows,
            "banned": layout.banned.tokens,
            "drawn": layout.drawn,
            "seed": layout.seed,
            "position": layout.position,
            "whole": layout.whole,
            "cut": layout.cut,
            "reported": layout.reported,
        }
        floats = {
            "repetition": penalties[0],
            "frequency": penalties[1],
            "presence": penalties[2],
            "bias": layout.bias,
            "temperature": layout.temperature,
            "min_p": layout.min_p,
            "top_k": layout.top_k,
            "top_p": layout.top_p,
        }
        at = {name: columns.ints(values) for name, values in ints.items() if values}
        at |= {name: columns.floats(values) for name, values in floats.items() if values}
        return lambda staged: cls(layout, staged, at)

    def ints(self, name: str) -> torch.Tensor:
        """int64 [n]."""
        return self.staged.ints[self.at[name]]

    def column(self, name: str) -> torch.Tensor:
        """float64 [n, 1]."""
        return self.staged.floats[self.at[name]].unsqueeze(1)


# ---- randomness ----

_GOLDEN, _M1, _M2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _shift_xor(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z ^ (z >> bits), the shift filled with zeros (that of int64 repeats the sign)."""
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele et al., 2014) of int64, modulo 2^64."""
    z = _shift_xor(z + _GOLDEN, 30) * _M1
    return _shift_xor(_shift_xor(z, 27) * _M2, 31)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64 [N], for requests' seeds int64 [N] and the positions [N] of tokens: the upper 53 bits
    of two rounds of SplitMix64.
    """
    return ((_mix(_mix(seeds) ^ positions) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


# ---- what changes logits before ----


def process(logits: torch.Tensor, choices: BoundChoices, counts: TokenCounts) -> torch.Tensor:
    """Logits [N, vocab] after penalties, bias and bans; the argument stays as it is."""
    layout = choices.layout
    if not (layout.penalties.rows or layout.bias or layout.banned.rows):
        return logits
    changed = logits.clone()
    if layout.penalties.rows:
        _penalise(changed, choices, counts)
    if layout.bias:
        added = choices.column("bias").squeeze(1).to(changed.dtype)
        changed.index_put_((choices.ints("biased_rows"), choices.ints("biased")), added, accumulate=True)
    if layout.banned.rows:
        never = torch.full((), float("-inf"), dtype=changed.dtype, device=changed.device)
        changed.index_put_((choices.ints("banned_rows"), choices.ints("banned")), never)
    return changed


def _penalise(logits: torch.Tensor, choices: BoundChoices, counts: TokenCounts) -> None:
    """Repetition as in transformers (Keskar et al., CTRL, 2019), then frequency and presence as in OpenAI's API.

    Only tokens that were seen are touched; one that stands there several times gets the same value as often.
    """
    places, most = choices.ints("places").unsqueeze(1), max(choices.layout.penalties.lengths)
    at = choices.ints("penalised").unsqueeze(1), counts.seen[:, :most][places.squeeze(1)]
    repetition, frequency, presence = (
        choices.column(name).to(logits.dtype) for name in ("repetition", "frequency", "presence")
    )
    scores, times = logits[at], counts.counts[places, at[1]] >> 1  # without whether the prompt has it
    scores = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores -= frequency * times
    scores -= presence * (times > 0)
    logits.index_put_(at, scores)


def _count(tokens: torch.Tensor, choices: BoundChoices, counts: TokenCounts) -> None:
    """The tokens [N] of rows with penalties were seen."""
    places, chosen = choices.ints("places"), tokens[choices.ints("penalised")]
    once = torch.full((), ONCE_MORE, dtype=counts.counts.dtype, device=chosen.device)
    counts.counts.index_put_((places, chosen), once, accumulate=True)
    counts.seen.index_put_((places, choices.ints("lengths")), chosen)


# ---- the choice ----


def choose(logits: torch.Tensor, choices: BoundChoices, counts: TokenCounts, draw: Draw) -> torch.Tensor:
    """A token, int64, for each row of logits [N, vocab]; `counts` are of those with penalties."""
    layout = choices.layout
    scores = process(logits, choices, counts)
    tokens = scores.argmax(-1)
    if layout.drawn:
        rows, some = choices.ints("drawn"), slice(layout.draws)
        u = uniforms(choices.ints("seed"), choices.ints("position")).unsqueeze(1)
        tokens.index_copy_(0, rows[some], draw(_probabilities(scores[rows], choices), choices, u)[some])
    if layout.penalties.rows:
        _count(tokens, choices, counts)
    return tokens


def _probabilities(scores: torch.Tensor, choices: BoundChoices) -> torch.Tensor:
    """Of the drawn rows' scores [D, vocab], zero where min_p cuts them off; their sum is not one then."""
    p = torch.softmax(scores / choices.column("temperature").to(scores.dtype), -1)
    if any(choices.layout.min_p):
        p = p.where(p >= choices.column("min_p").to(p.dtype) * p.amax(-1, keepdim=True), 0.0)
    return p


def sorted_whole(p: torch.Tensor, choices: BoundChoices, u: torch.Tensor) -> torch.Tensor:
    """`Draw` that sorts all tokens: nothing is asked of the host."""
    tokens = _drawn_whole(p, choices, u)
    if choices.layout.cut:
        some = choices.ints("cut")
        tokens.index_copy_(0, some, _among_likeliest(p, choices, u, some, p.shape[1])[0])
    return tokens


def widening(p: torch.Tensor, choices: BoundChoices, u: torch.Tensor) -> torch.Tensor:
    """`Draw` for a CPU, where sorting a vocabulary takes longer than all the rest: the likeliest CANDIDATES are
    tried first, then more of them; only a row that is nearly flat is sorted whole.
    """
    tokens = _drawn_whole(p, choices, u)
    left, width = choices.layout.cut[: choices.layout.cuts], min(CANDIDATES + 1, p.shape[1])
    while left:
        some = torch.tensor(repeat_last(left, ROWS))
        found, decided = _among_likeliest(p, choices, u, some, width)
        tokens[some] = found
        left = [place for place, done in zip(left, decided.tolist(), strict=False) if not done]
        width = min(16 * width, p.shape[1])
    return tokens


def _drawn_whole(p: torch.Tensor, choices: BoundChoices, u: torch.Tensor) -> torch.Tensor:
    """Tokens [D] of which those of the rows that nothing cuts are drawn."""
    tokens = torch.zeros(p.shape[0], dtype=torch.int64, device=p.device)
    if choices.layout.whole:
        some = choices.ints("whole")
        tokens.index_copy_(0, some, _inverted(p[some], u[some]))
    return tokens


def _inverted(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Where the sum of each row of p [N, n] is first more than u [N, 1] times the whole: [N]."""
    mass = p.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(mass, u * mass[:, -1:], right=True).clamp_(max=p.shape[1] - 1).squeeze(1)


def _among_likeliest(
    p: torch.Tensor, choices: BoundChoices, u: torch.Tensor, some: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from what top_k and then top_p leave of `some` [N] of the rows of p [D, vocab] at u [D, 1].

    Only the `width` likeliest are looked at. Returns tokens [N], and whether that decided each [N].
    """
    p, u, top_k, top_p = p[some], u[some], choices.column("top_k")[some], choices.column("top_p")[some]
    if width == p.shape[1]:
        values = p.sort(descending=True).values
        last, equal = _ends(values, p, top_k, top_p)
        return _inverted(_kept(p, last, equal), u), torch.ones_like(some, dtype=torch.bool)
    values, tokens = p.topk(width)
    last, equal = _ends(values, p, top_k, top_p)
    within = (top_k <= width) | (top_k >= p.shape[1])
    within &= (last > values[:, -1:]) | (last == 0)  # or others that equal the last may come before those that are seen
    tokens = tokens.sort(-1).values
    place = _inverted(_kept(p.gather(1, tokens), last, equal), u)
    return tokens.gather(1, place.unsqueeze(1)).squeeze(1), within.squeeze(1)


def _ends(
    values: torch.Tensor, p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last value that is kept of p [N, vocab], whose likeliest in order are `values` [N, width], and how many are
    kept of those that have it: [N, 1] each, the last of `values` where more of them are kept.
    """
    width, vocab = values.shape[1], p.shape[1]
    mass = values.cumsum(-1, dtype=torch.float64)
    kth = mass.gather(1, top_k.clamp(max=width).long() - 1)
    total = torch.where(top_k < vocab, kth, p.sum(-1, keepdim=True, dtype=torch.float64))
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], 1)
    ranks = torch.arange(width, device=p.device)
    kept = ((before < top_p * total) & (ranks < top_k)).sum(-1, keepdim=True).clamp_(min=1)
    last = values.gather(1, kept - 1)
    return last, kept - (values > last).sum(-1, keepdim=True)


def _kept(p: torch.Tensor, last: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """p [N, n], zero where it is less than `last` [N, 1], or behind the first `equal` [N, 1] that are the same."""
    same = p == last
    return p.where((p > last) | (same & (same.cumsum(-1) <= equal)), 0.0)
