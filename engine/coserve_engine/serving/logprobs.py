"""Log-probabilities to report: of the chosen token and of the likeliest ones, from the model's own distribution.

They come from the function that training uses (`head.log_probabilities`) over rows that are the same bits, so the two
agree exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coserve_engine.messages import MAX_LOGPROBS, TokenLogprobs
from coserve_engine.model.executor import Executor

CHUNK_ROWS = 64
"""Rows of a prompt whose [rows, vocab] exist at once."""


def of_choices(
    executor: Executor, logits: torch.Tensor, chosen: Sequence[tuple[int, int, int]]
) -> dict[int, TokenLogprobs]:
    """By row, for `chosen` (row of logits [N, vocab], token, how many of the likeliest to report)."""
    if not chosen:
        return {}
    rows = [row for row, _, _ in chosen]
    logp = executor.log_probabilities_of(logits, rows)
    tops = [top for _, _, top in chosen]
    return dict(zip(rows, _pick(logp, [token for _, token, _ in chosen], tops), strict=True))


def of_prompt(executor: Executor, hidden: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprobs]:
    """One for each of the `targets` [N] that follow hidden rows [N, H]."""
    found = []
    for start in range(0, len(targets), CHUNK_ROWS):
        part = targets[start : start + CHUNK_ROWS]
        logp = executor.log_probabilities(hidden[start : start + len(part)])
        found += _pick(logp, part, [top] * len(part))
    return found


def _pick(logp: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    index = torch.tensor(list(tokens), dtype=torch.int64, device=logp.device).unsqueeze(1)
    picked: list[float] = logp.gather(1, index).squeeze(1).tolist()
    ranks: list[int] = (logp >= logp.gather(1, index)).sum(1).tolist()
    if not any(tops):
        return [TokenLogprobs(value, rank, ()) for value, rank in zip(picked, ranks, strict=True)]
    best = logp.topk(min(MAX_LOGPROBS, logp.shape[1]))  # as many for each: ties must not fall as a neighbour wants
    likeliest = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [
        TokenLogprobs(value, rank, some[:top])
        for value, rank, some, top in zip(picked, ranks, likeliest, tops, strict=True)
    ]
