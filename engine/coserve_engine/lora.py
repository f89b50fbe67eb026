"""LoRA weights in one flat buffer, and a linear layer whose rows belong to different adapters.

All adapters of a batch share the one GEMM of the frozen weight; each adapter adds scale * (x A^T) B^T to its own
rows. Ranks are stored rounded up to 8 with zeros (products of 5 to 7 columns are not row-invariant on CPUs), A and B
unscaled as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.dropout import dropout
from coserve_engine.linears import FrozenLinear
from coserve_engine.messages import LoraSpec

AB = tuple[torch.Tensor, torch.Tensor]
"""A [padded rank, in] and B [out, padded rank]."""


class LoraLayout:
    """Where (layer, linear, A | B) stands in a flat buffer: layer by layer, linears in the order of LINEARS, A
    before B.
    """

    def __init__(self, config: ModelConfig, spec: LoraSpec) -> None:
        self.config, self.spec = config, spec
        self.padded_rank = -(-spec.rank // 8) * 8
        self.targets = tuple(name for name in LINEARS if name in spec.targets)
        self.size = config.layers * sum(self.padded_rank * sum(config.linear_shape(n)) for n in self.targets)

    def views(self, flat: torch.Tensor) -> tuple[dict[str, AB], ...]:
        """Per layer: linear name -> (A, B), views into `flat` [size]."""
        layers, start, rank = [], 0, self.padded_rank
        for _ in range(self.config.layers):
            layer: dict[str, AB] = {}
            for name in self.targets:
                out, into = self.config.linear_shape(name)
                middle, end = start + rank * into, start + rank * (into + out)
                layer[name] = (flat[start:middle].view(rank, into), flat[middle:end].view(out, rank))
                start = end
            layers.append(layer)
        return tuple(layers)

    def fresh(self, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Initial parameters as PEFT's: A uniform with Kaiming's bound for a = sqrt(5), B zero."""
        flat = torch.zeros(self.size, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.views(flat):
            for a, _ in layer.values():
                bound = 1.0 / math.sqrt(a.shape[1])
                values = torch.rand(self.spec.rank, a.shape[1], generator=generator, dtype=torch.float32)
                a[: self.spec.rank] = values.mul_(2 * bound).sub_(bound)
        return flat.to(device)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter, ready to compute with."""

    scale: float
    layers: tuple[Mapping[str, AB], ...]


@dataclass(frozen=True, slots=True)
class RowDropout:
    """Dropout of the inputs of A for rows with these `keys` [R] (`dropout.row_keys`), of probability `p`."""

    keys: torch.Tensor
    p: float

    def __call__(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        """x [R, in] with what this linear drops; also its own derivative."""
        return dropout(x, self.keys, layer, name, self.p)


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Rows of a batch that use one adapter.

    `rows` picks them: a slice of neighbours, or an index [padded] with the last one repeated up to the row multiple, of
    which the first `count` are written back. `drop` has the keys of the rows so picked; None where nothing is dropped.
    """

    weights: LoraWeights
    rows: slice | torch.Tensor
    count: int
    drop: RowDropout | None = None

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> the group's rows, padded."""
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """Add low [padded, rank] b [out, rank]^T to the group's rows of y [T, out]."""
        rows = self.pick(y).addmm_(low, b.t())
        if not isinstance(self.rows, slice):
            y.index_copy_(0, self.rows[: self.count], rows[: self.count])


def linear(x: torch.Tensor, weight: FrozenLinear, groups: tuple[LoraGroup, ...], layer: int, name: str) -> torch.Tensor:
    """x [T, in] -> [T, out]: one GEMM for all rows, then each adapter's two small ones for its rows."""
    y = weight.forward(x)
    for group in groups:
        pair = group.weights.layers[layer].get(name)
        if pair is not None:
            a, b = pair
            rows = group.pick(x)
            if group.drop is not None:
                rows = group.drop(rows, layer, name)
            low = functional.linear(rows, a).mul_(group.weights.scale)
            group.add(y, low, b)
    return y


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: FrozenLinear,
    pair: AB | None,
    grads: AB | None,
    scale: float,
    tiles: tuple[tuple[int, int], ...],
    drop: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    need_dx: bool,
) -> torch.Tensor | None:
    """Backward of `linear` for rows of one pass.

    Args:
        dy: [R, out]; x: [R, in]; weight: from in to out, frozen.
        pair, grads: the adapter's (A, B) and the buffers its gradients are added to; None where it has none here.
        tiles: row ranges in the order in which they are summed, so that the sum does not depend on the unit.
        drop: dropout of the rows' inputs to A; None where nothing is dropped.
        need_dx: False leaves dx out (nothing below the first layer needs it).

    Returns:
        dx [R, in], or None.
    """
    dx = weight.backward(dy) if need_dx else None
    if pair is not None and grads is not None:
        a, b = pair
        x = x if drop is None else drop(x)
        low = functional.linear(x, a).mul_(scale)
        dlow = (dy @ b).mul_(scale)
        for start, stop in tiles:
            grads[0].addmm_(dlow[start:stop].t(), x[start:stop])
            grads[1].addmm_(dy[start:stop].t(), low[start:stop])
        if dx is None:
            return None
        if drop is None:
            dx.addmm_(dlow, a)
        else:
            dx += drop(dlow @ a)
    return dx
