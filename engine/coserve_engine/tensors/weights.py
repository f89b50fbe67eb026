"""The frozen weights as a forward reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class FrozenLinear(Protocol):
    """A weight [out, in] that is never trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out], with the bias."""

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T, out] -> dx [T, in]."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`linears[name]` with their biases; norms [hidden], q_norm and k_norm [D]. `fused`: groups of linears that a table
    has in one weight, the outputs of one linear after another's; the linears are views of it then.
    """

    linears: Mapping[str, FrozenLinear]
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    fused: Mapping[tuple[str, ...], FrozenLinear]


@dataclass(frozen=True, slots=True)
class Weights:
    """embed [vocab, hidden], norm [hidden], head from hidden to vocab."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: FrozenLinear
