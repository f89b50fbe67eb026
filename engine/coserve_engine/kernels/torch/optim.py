"""AdamW that the host never waits for: norm, clipping and the choice to skip stay on the device."""

from __future__ import annotations

import torch

from coserve_engine.tensors.adam import AdamState, AdamW


def adamw(param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> torch.Tensor:
    """One update of `param` [size] in place, unless `grad` is not finite; that is clipped and used up.

    Clipped as by torch.nn.utils.clip_grad_norm_; torch's fused update does nothing where `found_inf` is 1, which it
    reads on the device.

    Returns:
        [2]: the gradient's norm before clipping, and 1 where there was an update.
    """
    norm = torch.linalg.vector_norm(grad)
    changed = norm.isfinite().float()
    if how.max_grad_norm > 0:
        grad.mul_((how.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
    torch._fused_adamw_(
        [param],
        [grad],
        [state.m],
        [state.v],
        [],
        [state.updates + 1],
        lr=how.lr,
        beta1=how.beta1,
        beta2=how.beta2,
        weight_decay=how.weight_decay,
        eps=how.eps,
        amsgrad=False,
        maximize=False,
        found_inf=1 - changed,
    )
    state.updates.add_(changed)
    return torch.stack([norm, changed.to(norm.dtype)])
