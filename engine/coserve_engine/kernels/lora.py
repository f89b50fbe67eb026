"""A linear layer whose rows belong to different adapters.

All adapters of a batch share the one GEMM of the frozen weight; each adapter adds scale * (x A^T) B^T to its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.kernels.dropout import dropout
from coserve_engine.numerics import repeat_last
from coserve_engine.tensors.lora import AB, LoraWeights, Pair
from coserve_engine.tensors.passes import RowDropout
from coserve_engine.tensors.weights import FrozenLinear


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Neighbouring rows of a batch, as many as the row multiple asks for, that use one adapter.

    `drop` has their keys; None where nothing is dropped.
    """

    weights: LoraWeights
    rows: slice
    drop: RowDropout | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, name: str) -> None:
        """Add the adapter's products of the group's rows of x [T, in] to those of y [T, out]."""
        pair = self.weights.layers[layer].get(name)
        if pair is not None:
            rows = x[self.rows]
            if self.drop is not None:
                rows = dropout(rows, self.drop.keys, layer, name, self.drop.p)
            _add(y[self.rows], rows, pair)


@dataclass(frozen=True, slots=True)
class ScatteredRows:
    """Rows of several adapters that are no neighbours, or too few: gathered once for all, each adapter's last row
    repeated up to the row multiple.

    Args:
        weights: the adapters, and `sizes` the rows of each, padding included.
        gathered: [sum(sizes)], the rows in the batch.
        real: [R], which of the gathered rows are no padding; `rows`: [R], where these stand in the batch.
    """

    weights: tuple[LoraWeights, ...]
    sizes: list[int]
    gathered: torch.Tensor
    real: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def put(
        cls, parts: Iterable[tuple[LoraWeights, list[int]]], multiple: int, columns: Columns
    ) -> Callable[[Staged], ScatteredRows]:
        """Put the rows of each adapter among what will be staged; to be called with that."""
        weights: list[LoraWeights] = []
        sizes: list[int] = []
        gathered: list[int] = []
        real: list[int] = []
        rows: list[int] = []
        for adapter, members in parts:
            padded = repeat_last(members, multiple)
            weights.append(adapter)
            sizes.append(len(padded))
            real += range(len(gathered), len(gathered) + len(members))
            gathered += padded
            rows += members
        places = [columns.ints(index) for index in (gathered, real, rows)]
        return lambda staged: cls(tuple(weights), sizes, *(staged.ints[at] for at in places))

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, name: str) -> None:
        """Add each adapter's products of its rows of x [T, in] to those of y [T, out]."""
        pairs = [weights.layers[layer].get(name) for weights in self.weights]
        if not any(pairs):
            return
        picked = y.index_select(0, self.gathered)
        parts = zip(
            pairs,
            picked.split_with_sizes(self.sizes),
            x.index_select(0, self.gathered).split_with_sizes(self.sizes),
            strict=True,
        )
        for pair, into, rows in parts:
            if pair is not None:
                _add(into, rows, pair)
        y.index_copy_(0, self.rows, picked.index_select(0, self.real))


AdapterRows = tuple[LoraGroup | ScatteredRows, ...]
"""Which rows of a batch use which adapter."""


def _add(y: torch.Tensor, x: torch.Tensor, pair: Pair) -> None:
    """y [R, out] += scale * (x [R, in] A^T) B^T, in two calls: with many adapters it is calls that take the time."""
    y.addmm_(torch.mm(x, pair.down), pair.up, alpha=pair.scale)


def linear(x: torch.Tensor, weight: FrozenLinear, adapters: AdapterRows, layer: int, name: str) -> torch.Tensor:
    """x [T, in] -> [T, out]: one GEMM for all rows, then each adapter's two small ones for its rows."""
    y = weight.forward(x)
    add_adapters(x, y, adapters, layer, name)
    return y


def add_adapters(x: torch.Tensor, y: torch.Tensor, adapters: AdapterRows, layer: int, name: str) -> None:
    """Add the products of each adapter's rows of x [T, in] to those of y [T, out]."""
    for rows in adapters:
        rows.add(x, y, layer, name)


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: FrozenLinear,
    pair: Pair | None,
    grads: AB | None,
    tiles: tuple[tuple[int, int], ...],
    drop: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    need_dx: bool,
) -> torch.Tensor | None:
    """Backward of `linear` for rows of one pass.

    Args:
        dy: [R, out]; x: [R, in]; weight: from in to out, frozen.
        pair, grads: what the adapter adds, and the buffers of the gradients of A and B; None where it has none here.
        tiles: row ranges in the order in which they are summed, so that the sum does not depend on the unit.
        drop: dropout of the rows' inputs to A; None where nothing is dropped.
        need_dx: False leaves dx out (nothing below the first layer needs it).

    Returns:
        dx [R, in], or None.
    """
    dx = weight.backward(dy) if need_dx else None
    if pair is not None and grads is not None:
        x = x if drop is None else drop(x)
        low = torch.mm(x, pair.down).mul_(pair.scale)
        dlow = (dy @ pair.b).mul_(pair.scale)
        for start, stop in tiles:
            grads[0].addmm_(dlow[start:stop].t(), x[start:stop])
            grads[1].addmm_(dy[start:stop].t(), low[start:stop])
        if dx is None:
            return None
        if drop is None:
            dx.addmm_(dlow, pair.a)
        else:
            dx += drop(dlow @ pair.a)
    return dx
