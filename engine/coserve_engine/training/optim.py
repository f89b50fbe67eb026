"""AdamW over one flat buffer, with clipping by the global norm, as torch.optim.AdamW and Hugging Face's
Trainer do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class AdamState:
    """First and second moments [size] and the number of updates applied."""

    m: torch.Tensor
    v: torch.Tensor
    updates: int = 0


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: AdamState,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """One update of `param` [size] in place; `grad` is clipped to the norm (max_grad_norm 0: never) and used up.

    Returns:
        The gradient's norm before clipping, and False where it was not finite: then nothing has changed.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if not norm < float("inf"):
        return norm, False
    if max_grad_norm > 0:
        grad.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
    state.updates += 1
    param.mul_(1 - lr * weight_decay)
    state.m.lerp_(grad, 1 - beta1)
    state.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1 = 1 - beta1**state.updates
    correction2 = 1 - beta2**state.updates
    denominator = torch.sqrt(state.v, out=grad).div_(correction2**0.5).add_(eps)
    param.addcdiv_(state.m, denominator, value=-lr / correction1)
    return norm, True
