"""What an optimizer step changes beside the parameters, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AdamState:
    """First and second moments [size] and the number of updates applied, a float32 [] beside them."""

    m: torch.Tensor
    v: torch.Tensor
    updates: torch.Tensor

    @classmethod
    def zeros(cls, param: torch.Tensor) -> AdamState:
        """Before the first update of `param` [size]."""
        return cls(torch.zeros_like(param), torch.zeros_like(param), counted(0, param.device))

    def copy(self) -> AdamState:
        return AdamState(self.m.clone(), self.v.clone(), self.updates.clone())


def counted(updates: int, device: torch.device) -> torch.Tensor:
    """So many updates."""
    return torch.full((), updates, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class AdamW:
    """How one update is made; a gradient is clipped to `max_grad_norm` (0: never)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
