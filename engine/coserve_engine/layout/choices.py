"""How the rows of an iteration that are sampled choose their tokens, as columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coserve_engine.messages import SamplingParams
from coserve_engine.numerics import repeat_last

GREEDY_BELOW = 1e-5
"""Temperatures below are 0, as in vLLM: dividing by them would overflow."""
ROWS = 4
"""Rows are padded to a multiple: the sum of a lone row may be split over threads, and then has other bits."""


class Seen(NamedTuple):
    """Where the tokens that a request has seen stand and are counted (`TokenCounts`), and how many stand there."""

    place: int
    length: int


class Choice(NamedTuple):
    """What a row's choice depends on besides its logits.

    Args:
        position: of the token to choose.
        banned: tokens that are not to be chosen, such as what would end an answer before `min_tokens`.
        seen: None where no penalty asks.
    """

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()
    seen: Seen | None = None


class Penalties(NamedTuple):
    """Of rows: the places and lengths of what they have seen, and what they are penalised by."""

    rows: list[int]
    places: list[int]
    lengths: list[int]
    repetition: list[float]
    frequency: list[float]
    presence: list[float]


class Cells(NamedTuple):
    """Places (row, token) of logits."""

    rows: list[int]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class ChoiceLayout:
    """Columns of N choices. Lists of rows are padded by repeating the last.

    Args:
        bias: what is added to the cells `biased`.
        drawn: rows that are not greedy, the first `draws` of them no padding; the columns behind are of these.
        whole, cut: places in `drawn` of rows that are drawn from all tokens, or from the likeliest; `cuts` says how
            many of `cut` are no padding.
        reported: rows whose log-probabilities are wanted, padded to the row multiple; of the first `reports`.
        tops: whether the likeliest are wanted as well.
    """

    count: int
    penalties: Penalties
    biased: Cells
    bias: list[float]
    banned: Cells
    drawn: list[int]
    draws: int
    temperature: list[float]
    min_p: list[float]
    top_k: list[float]
    top_p: list[float]
    seed: list[int]
    position: list[int]
    whole: list[int]
    cut: list[int]
    cuts: int
    reported: list[int]
    reports: int
    tops: bool

    @classmethod
    def of(cls, choices: Sequence[Choice], vocab: int, row_multiple: int) -> ChoiceLayout:
        """`vocab`: tokens that there are."""
        penalised: list[tuple[int, Choice]] = []
        biased: list[tuple[int, int, float]] = []
        banned: list[tuple[int, int]] = []
        reported: list[int] = []
        drawn: list[int] = []
        for row, choice in enumerate(choices):
            params, _, never, seen = choice
            if seen is not None:
                penalised.append((row, choice))
            if params.logit_bias:
                biased += [(row, *pair) for pair in params.logit_bias]
            if never:
                banned += [(row, token) for token in never]
            if params.logprobs is not None:
                reported.append(row)
            if params.temperature >= GREEDY_BELOW:
                drawn.append(row)
        rows = repeat_last(drawn, ROWS)
        several = [choices[row].params for row in rows]
        cut: list[int] = []
        whole: list[int] = []
        for place, one in enumerate(several[: len(drawn)]):
            (cut if 0 < one.top_k < vocab or one.top_p < 1 else whole).append(place)
        return cls(
            count=len(choices),
            penalties=_penalties(penalised),
            biased=Cells([row for row, _, _ in biased], [token for _, token, _ in biased]),
            bias=[value for _, _, value in biased],
            banned=Cells([row for row, _ in banned], [token for _, token in banned]),
            drawn=rows,
            draws=len(drawn),
            temperature=[one.temperature for one in several],
            min_p=[one.min_p for one in several],
            top_k=[float(one.top_k if one.top_k > 0 else vocab) for one in several],
            top_p=[one.top_p for one in several],
            seed=[_signed(one.seed) for one in several],
            position=[choices[row].position for row in rows],
            whole=repeat_last(whole, ROWS),
            cut=repeat_last(cut, ROWS),
            cuts=len(cut),
            reported=repeat_last(reported, row_multiple),
            reports=len(reported),
            tops=any(choices[row].params.logprobs for row in reported),
        )


def _penalties(penalised: Sequence[tuple[int, Choice]]) -> Penalties:
    params = [choice.params for _, choice in penalised]
    seen = [choice.seen for _, choice in penalised if choice.seen is not None]
    return Penalties(
        rows=[row for row, _ in penalised],
        places=[one.place for one in seen],
        lengths=[one.length for one in seen],
        repetition=[one.repetition_penalty for one in params],
        frequency=[one.frequency_penalty for one in params],
        presence=[one.presence_penalty for one in params],
    )


def _signed(seed: int) -> int:
    """The int64 with the lowest 64 bits of a seed."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
