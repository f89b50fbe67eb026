"""AdamW over one flat buffer, with clipping by the global norm, as torch.optim.AdamW and Hugging Face's
Trainer do it.
"""

from __future__ import annotations

import torch

from coserve_engine.tensors.adam import AdamState, AdamW


def adamw(param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> tuple[float, bool]:
    """One update of `param` [size] in place; `grad` is clipped and used up.

    Returns:
        The gradient's norm before clipping, and False where it was not finite: then nothing has changed.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if not norm < float("inf"):
        return norm, False
    if how.max_grad_norm > 0:
        grad.mul_(min(1.0, how.max_grad_norm / (norm + 1e-6)))
    updates = int(state.updates.add_(1))
    param.mul_(1 - how.lr * how.weight_decay)
    state.m.lerp_(grad, 1 - how.beta1)
    state.v.mul_(how.beta2).addcmul_(grad, grad, value=1 - how.beta2)
    correction1 = 1 - how.beta1**updates
    correction2 = 1 - how.beta2**updates
    denominator = torch.sqrt(state.v, out=grad).div_(correction2**0.5).add_(how.eps)
    param.addcdiv_(state.m, denominator, value=-how.lr / correction1)
    return norm, True
