"""The language-model head: logits to sample from, and a loss over targets, of a tile or of some at once.

Rows without weight never meet the head; the frozen head gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from coserve_engine.kernels.protocol import Kernels
from coserve_engine.model.passes import PassState
from coserve_engine.tensors.weights import FrozenLinear


def logits(hidden: torch.Tensor, norm: torch.Tensor, head: FrozenLinear, kernels: Kernels[Any, Any]) -> torch.Tensor:
    """hidden [N, H] -> [N, vocab]."""
    return kernels.logits(kernels.norm(hidden, norm)[1], head)


def head_unit(
    state: PassState,
    first: int,
    end: int,
    norm: torch.Tensor,
    head: FrozenLinear,
    kernels: Kernels[Any, Any],
) -> None:
    """Loss of tiles [first, end) of a pass and, when training, its gradient into state.dx."""
    for tiles in _at_once(state, first, end, kernels.head_rows):
        spans, rows = state.spans[tiles], state.head_tiles[tiles]
        from_row, stop_row, end_row = rows[0].first, rows[-1].stop, rows[-1].end
        count = stop_row - from_row
        if state.training:
            state.dx[spans[0].start : spans[-1].stop].zero_()
        if count == 0:
            continue
        padded = state.head_rows[from_row:end_row]
        picked = padded[:count]
        x, xn, rstd = kernels.norm(state.final[padded], norm)
        targets = state.targets[padded]
        target_logp, kept = kernels.score(kernels.logits(xn, head), targets)
        weights = state.row_weights[padded]
        loss, slope = state.terms.loss.coefficient(target_logp, weights, state.terms.inputs[:, padded])
        if state.terms.logp is not None:
            state.terms.logp[picked] = target_logp[:count]
        state.losses[tiles.start] = loss[:count].double().sum()
        if state.training:
            dlogits = kernels.score_backward(kept, targets, slope)
            state.dx[picked] = kernels.norm_backward(kernels.logits_backward(dlogits, head), x, rstd, norm)[:count]


def _at_once(state: PassState, first: int, end: int, most: int) -> Iterator[slice]:
    """Tiles [first, end) that meet the head together, last first: as many as have `most` rows, or one."""
    while end > first:
        begin = end - 1
        while begin > first and state.head_tiles[end - 1].stop - state.head_tiles[begin - 1].first <= most:
            begin -= 1
        yield slice(begin, end)
        end = begin
