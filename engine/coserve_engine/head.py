"""The language-model head: logits to sample from, and a loss over targets computed tile by tile.

Every loss that we know of needs only the targets' log-probabilities, so the loss is a function from those to its
value and its derivative. Rows without weight never meet the head; logits of more than a tile never exist; the frozen
head gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from coserve_engine.functional import rms_norm, rms_norm_backward
from coserve_engine.numerics import Numerics
from coserve_engine.passes import PassState

Coefficient = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logp [N], weights [N]) -> (loss [N], dloss/dlogp [N])."""


def cross_entropy(logp: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood."""
    return -weights * logp, -weights


def logits(hidden: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden [N, H] -> [N, vocab]."""
    return functional.linear(rms_norm(hidden, norm, eps)[0], head)


def head_unit(
    state: PassState,
    first: int,
    end: int,
    norm: torch.Tensor,
    head: torch.Tensor,
    eps: float,
    numerics: Numerics,
    coefficient: Coefficient = cross_entropy,
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
        padded = torch.cat([picked, picked[-1:].expand(numerics.pad(count) - count)])
        x = state.final[padded]
        xn, rstd = rms_norm(x, norm, eps)
        scores = functional.linear(xn, head)
        logp = scores.sub_(torch.logsumexp(scores, -1, keepdim=True))
        targets = state.targets[padded].unsqueeze(1)
        weights = state.row_weights[padded]
        loss, slope = coefficient(logp.gather(1, targets).squeeze(1), weights)
        state.losses[index] = float(loss[:count].double().sum())
        if state.training:
            # d logp[target] / d logits = onehot(target) - softmax
            slope = slope.unsqueeze(1)
            dlogits = logp.exp_().mul_(-slope).scatter_add_(1, targets, slope)
            state.dx[picked] = rms_norm_backward(dlogits @ head, x, rstd, norm)[:count]
