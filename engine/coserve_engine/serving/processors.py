"""What changes a request's logits before one is chosen: penalties, bias, and the ban on ending too early.

Everything is sparse: a request touches the logits of the tokens that it has seen, not of the whole vocabulary. One
gather and one scatter serve all rows of an iteration, and what they do to a row depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coserve_engine.messages import SamplingParams


class TokenCounts:
    """The tokens that a request has seen and how often its output has each: kept as tensors, one token at a time."""

    def __init__(self, prompt: Sequence[int], max_tokens: int, device: torch.device) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        room = len(self._place) + max_tokens
        self._ids = torch.zeros(room, dtype=torch.int64, device=device)
        self._counts = torch.zeros(room, dtype=torch.float32, device=device)
        self._ids[: len(self._place)] = torch.tensor(list(self._place), dtype=torch.int64, device=device)

    def add(self, token: int) -> None:
        """`token` was chosen."""
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> torch.Tensor:
        """[n], each token once."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> torch.Tensor:
        """[n]: how often the output has each; 0 for a token of the prompt only."""
        return self._counts[: len(self._place)]


@dataclass(slots=True)
class Processors:
    """Those of one request. `enders` are the tokens that would end it."""

    params: SamplingParams
    seen: TokenCounts | None
    bias_ids: torch.Tensor
    bias: torch.Tensor
    enders: torch.Tensor
    chosen: int = 0

    @classmethod
    def create(
        cls, params: SamplingParams, prompt: Sequence[int], enders: Sequence[int], device: torch.device
    ) -> Processors | None:
        """None where the parameters leave the logits as they are."""
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        if not penalties and not params.logit_bias and params.min_tokens == 0:
            return None
        return cls(
            params,
            TokenCounts(prompt, params.max_tokens, device) if penalties else None,
            torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64, device=device),
            torch.tensor([value for _, value in params.logit_bias], dtype=torch.float32, device=device),
            torch.tensor(list(enders), dtype=torch.int64, device=device),
        )

    def add(self, token: int) -> None:
        """`token` was chosen."""
        self.chosen += 1
        if self.seen is not None:
            self.seen.add(token)


def process(logits: torch.Tensor, rows: Sequence[tuple[int, Processors]]) -> torch.Tensor:
    """Logits [N, vocab] with the `rows` (row, its processors) changed; the argument stays as it is."""
    if not rows:
        return logits
    changed = logits.clone()
    flat, width = changed.view(-1), changed.shape[1]
    _penalise(flat, width, [(row, one.params, one.seen) for row, one in rows if one.seen is not None])
    biased = [(row, one) for row, one in rows if one.params.logit_bias]
    if biased:
        index = torch.cat([one.bias_ids + row * width for row, one in biased])
        flat.index_add_(0, index, torch.cat([one.bias for _, one in biased]).to(flat.dtype))
    early = [one.enders + row * width for row, one in rows if one.chosen < one.params.min_tokens]
    if early:
        flat.index_fill_(0, torch.cat(early), float("-inf"))
    return changed


def _penalise(flat: torch.Tensor, width: int, rows: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    """Repetition as in transformers (Keskar et al., CTRL, 2019), then frequency and presence as in OpenAI's API."""
    if not rows:
        return
    index = torch.cat([seen.ids + row * width for row, _, seen in rows])
    counts = torch.cat([seen.counts for _, _, seen in rows]).to(flat.dtype)
    lengths = torch.tensor([seen.ids.shape[0] for _, _, seen in rows], device=flat.device)

    def spread(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=flat.dtype, device=flat.device).repeat_interleave(lengths)

    repetition = spread([params.repetition_penalty for _, params, _ in rows])
    scores = flat[index]
    scores = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores -= spread([params.frequency_penalty for _, params, _ in rows]) * counts
    scores -= spread([params.presence_penalty for _, params, _ in rows]) * (counts > 0)
    flat[index] = scores
