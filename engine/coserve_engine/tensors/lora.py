"""LoRA weights: an adapter in one flat buffer while it trains, and what products read of it.

Ranks are stored rounded up to 8 with zeros (products of 5 to 7 columns are not row-invariant on CPUs), A and B
unscaled as in PEFT. On a CPU products of x with A^T and B^T read copies that are stored turned, [in, rank] and
[rank, out]: where BLAS has to turn A itself, its kernels for few rows sum in another order than those for many on some
processors, and are slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import AdapterFolderError
from coserve_engine.messages import LoraSpec

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
    """What a linear adds by one adapter: A and B, both turned, and what their product is scaled by. Each may be a view
    of the other.
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
    def served(cls, factors: Factors, *, turned: bool) -> Pair:
        """With copies of factors, which never change; they lie `turned` or as they are."""
        (rank, into), out = factors.a.shape, factors.b.shape[0]
        if turned:
            down = factors.a.new_zeros(into, padded(rank))
            up = factors.b.new_zeros(padded(rank), out)
            down[:, :rank], up[:rank] = factors.a.t(), factors.b.t()
            return cls(down.t(), up.t(), down, up, factors.scale)
        a, b = factors.a.new_zeros(padded(rank), into), factors.b.new_zeros(out, padded(rank))
        a[:rank], b[:, :rank] = factors.a, factors.b
        return cls(a, b, a.t(), b.t(), factors.scale)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one that is served, what lies in one piece."""
        return (self.down, self.up) if self.down.is_contiguous() else (self.a, self.b)

    def moved(self, parts: tuple[torch.Tensor, torch.Tensor]) -> Pair:
        """With other tensors in the place of `parts`."""
        first, second = parts
        if self.down.is_contiguous():
            return Pair(first.t(), second.t(), first, second, self.scale)
        return Pair(first, second, first.t(), second.t(), self.scale)


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
    copied: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where another dtype computes than is trained: the parameters [size], and what was made of them."""
    turned: bool = False
    """Whether `down` and `up` are copies of factors that change."""

    @classmethod
    def served(cls, layers: Iterable[Mapping[str, Factors]], load: int = 0, *, turned: bool = True) -> LoraWeights:
        """Per layer: linear name -> its factors, for those that are adapted; they are copied, to lie as products read
        them.
        """
        pairs = ({name: Pair.served(factors, turned=turned) for name, factors in layer.items()} for layer in layers)
        return cls(tuple(pairs), load)

    @classmethod
    def trained(
        cls, layout: LoraLayout, flat: torch.Tensor, dtype: torch.dtype | None = None, *, turned: bool = True
    ) -> LoraWeights:
        """Of parameters `flat` [layout.size] that change, to compute with as `dtype` (None: theirs), by products that
        read copies that lie `turned`, or views; to be renewed when they did.
        """
        used, scale = flat.to(dtype or flat.dtype), layout.spec.scale

        def pair(a: torch.Tensor, b: torch.Tensor) -> Pair:
            down, up = (a.t().contiguous(), b.t().contiguous()) if turned else (a.t(), b.t())
            return Pair(a, b, down, up, scale)

        layers = tuple({name: pair(*ab) for name, ab in layer.items()} for layer in layout.views(used))
        return cls(layers, copied=None if used is flat else (flat, used), turned=turned)

    def moved(self, move: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]) -> LoraWeights:
        """One that is served, with the tensors that `move` makes of all of its."""
        moved = iter(move([part for layer in self.layers for pair in layer.values() for part in pair.parts]))
        layers = [
            {name: pair.moved((next(moved), next(moved))) for name, pair in layer.items()} for layer in self.layers
        ]
        return LoraWeights(tuple(layers), self.load)

    @property
    def bytes(self) -> int:
        """Of the factors of one that is served."""
        return sum(part.nbytes for layer in self.layers for pair in layer.values() for part in pair.parts)

    def renew(self) -> None:
        """Take over the parameters, which an optimizer changed."""
        if self.copied is not None:
            master, used = self.copied
            used.copy_(master)
        for layer in self.layers if self.turned else ():
            for pair in layer.values():
                pair.down.copy_(pair.a.t())
                pair.up.copy_(pair.b.t())
