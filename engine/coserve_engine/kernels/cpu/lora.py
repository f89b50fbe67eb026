"""LoRA weights in one flat buffer, and a linear layer whose rows belong to different adapters.

All adapters of a batch share the one GEMM of the frozen weight; each adapter adds scale * (x A^T) B^T to its own
rows. Ranks are stored rounded up to 8 with zeros (products of 5 to 7 columns are not row-invariant on CPUs), A and B
unscaled as in PEFT. Products of x with A^T and B^T read copies that are stored turned, [in, rank] and [rank, out]:
where BLAS has to turn A itself, its kernels for few rows sum in another order than those for many on some processors,
and are slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import AdapterFolderError
from coserve_engine.kernels.cpu.dropout import dropout
from coserve_engine.kernels.cpu.linears import FrozenLinear
from coserve_engine.messages import LoraSpec
from coserve_engine.numerics import repeat_last

AB = tuple[torch.Tensor, torch.Tensor]
"""A [padded rank, in] and B [out, padded rank]."""


class Factors(NamedTuple):
    """An adapter's part in one linear, as a folder holds it."""

    a: torch.Tensor
    """[rank, in]."""
    b: torch.Tensor
    """[out, rank]."""
    scale: float


class Pair(NamedTuple):
    """What a linear adds by one adapter: A and B, both stored turned, and what their product is scaled by. Where an
    adapter is only served A and B are views of these.
    """

    a: torch.Tensor
    """[padded rank, in]."""
    b: torch.Tensor
    """[out, padded rank]."""
    down: torch.Tensor
    """[in, padded rank]."""
    up: torch.Tensor
    """[padded rank, out]."""
    scale: float

    @classmethod
    def served(cls, factors: Factors) -> Pair:
        """With copies of factors, which never change."""
        (rank, into), out = factors.a.shape, factors.b.shape[0]
        down = factors.a.new_zeros(into, padded(rank))
        up = factors.b.new_zeros(padded(rank), out)
        down[:, :rank], up[:rank] = factors.a.t(), factors.b.t()
        return cls(down.t(), up.t(), down, up, factors.scale)


def padded(rank: int) -> int:
    """The rank that is stored."""
    return -(-rank // 8) * 8


class LoraLayout:
    """Where (layer, linear, A | B) stands in a flat buffer: layer by layer, linears in the order of LINEARS, A
    before B.
    """

    def __init__(self, config: ModelConfig, spec: LoraSpec) -> None:
        self.config, self.spec = config, spec
        self.padded_rank = padded(spec.rank)
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

    def turned(self, flat: torch.Tensor) -> tuple[dict[str, AB], ...]:
        """Per layer: linear name -> (A^T, B^T), copies of what is in `flat` [size]."""
        return tuple(
            {name: (a.t().contiguous(), b.t().contiguous()) for name, (a, b) in layer.items()}
            for layer in self.views(flat)
        )

    def flat(self, layers: Sequence[Mapping[str, Factors]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[size], of the factors of all the layout's linears, layer by layer.

        Raises:
            AdapterFolderError: a layer has other linears, or one of another rank.
        """
        rank, flat = self.spec.rank, torch.zeros(self.size, dtype=dtype, device=device)
        for index, (found, layer) in enumerate(zip(layers, self.views(flat), strict=True)):
            ranks = {name: factors.a.shape[0] for name, factors in found.items()}
            if ranks != dict.fromkeys(self.targets, rank):
                raise AdapterFolderError(f"layer {index} adapts {ranks}; the job's are {self.targets} of rank {rank}")
            for name, (a, b) in layer.items():
                a[:rank], b[:, :rank] = found[name].a, found[name].b
        return flat

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
    """One adapter, ready to compute with. `load` tells apart what an engine loads, even under one version."""

    layers: tuple[Mapping[str, Pair], ...]
    load: int = 0

    @classmethod
    def served(cls, layers: Iterable[Mapping[str, Factors]], load: int = 0) -> LoraWeights:
        """Per layer: linear name -> its factors, for those that are adapted; they are copied."""
        return cls(tuple({name: Pair.served(factors) for name, factors in layer.items()} for layer in layers), load)

    @classmethod
    def trained(cls, layout: LoraLayout, flat: torch.Tensor) -> LoraWeights:
        """Of parameters `flat` [layout.size] that change; to be renewed when they did."""
        layers = zip(layout.views(flat), layout.turned(flat), strict=True)
        scale = layout.spec.scale
        return cls(
            tuple({name: Pair(*ab, *turned[name], scale) for name, ab in layer.items()} for layer, turned in layers)
        )

    def renew(self) -> None:
        """Take over A and B, which an optimizer changed, into `down` and `up`."""
        for layer in self.layers:
            for pair in layer.values():
                pair.down.copy_(pair.a.t())
                pair.up.copy_(pair.b.t())


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
                rows = self.drop(rows, layer, name)
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
    def of(cls, parts: Iterable[tuple[LoraWeights, list[int]]], multiple: int, device: torch.device) -> ScatteredRows:
        """The rows of each adapter."""
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
        where = (torch.tensor(index, dtype=torch.int64, device=device) for index in (gathered, real, rows))
        return cls(tuple(weights), sizes, *where)

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
    for rows in adapters:
        rows.add(x, y, layer, name)
    return y


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
