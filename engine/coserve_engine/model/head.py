"""The language-model head: logits to sample from, and a loss over targets computed tile by tile.

Rows without weight never meet the head; logits of more than a tile never exist; the frozen
head gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from coserve_engine.kernels.functional import repeat_last_row
from coserve_engine.kernels.protocol import Kernels
from coserve_engine.model.passes import PassState
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.weights import FrozenLinear


def logits(hidden: torch.Tensor, norm: torch.Tensor, head: FrozenLinear, kernels: Kernels[Any, Any]) -> torch.Tensor:
    """hidden [N, H] -> [N, vocab]."""
    return kernels.logits(kernels.norm(hidden, norm)[1], head)


def log_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Log-softmax of logits [N, vocab], in their place: what training, evaluation and sampling all report.

    N must be a multiple of the row multiple, as for the GEMM before it: the sum of a lone row may be split over
    threads, and then has other bits.
    """
    return scores.sub_(torch.logsumexp(scores, -1, keepdim=True))


def head_unit(
    state: PassState,
    first: int,
    end: int,
    norm: torch.Tensor,
    head: FrozenLinear,
    kernels: Kernels[Any, Any],
    numerics: Numerics,
) -> None:
    """Loss of tiles [first, end) of a pass and, when training, its gradient into state.dx."""
    for index in reversed(range(first, end)):
        span = state.spans[index]
        rows = torch.arange(span.start, span.stop, device=state.final.device)
        if state.training:
            state.dx[span.start : span.stop] = 0
        picked = rows[state.row_weights[span.start : span.stop] != 0]
        count = picked.shape[0]
        if count == 0:
            continue
        padded = repeat_last_row(picked, numerics.row_multiple)
        x, xn, rstd = kernels.norm(state.final[padded], norm)
        logp = log_probabilities(kernels.logits(xn, head))
        targets = state.targets[padded].unsqueeze(1)
        weights = state.row_weights[padded]
        target_logp = logp.gather(1, targets).squeeze(1)
        loss, slope = state.terms.loss.coefficient(target_logp, weights, state.terms.inputs[:, padded])
        if state.terms.logp is not None:
            state.terms.logp[picked] = target_logp[:count]
        state.losses[index] = float(loss[:count].double().sum())
        if state.training:
            # d logp[target] / d logits = onehot(target) - softmax
            slope = slope.unsqueeze(1)
            dlogits = logp.exp_().mul_(-slope).scatter_add_(1, targets, slope)
            state.dx[picked] = kernels.norm_backward(kernels.logits_backward(dlogits, head), x, rstd, norm)[:count]
