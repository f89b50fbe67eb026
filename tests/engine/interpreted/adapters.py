"""Adapters, batches and passes without an engine around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.config import LINEARS
from coserve_engine.device.cpu import CpuDevice
from coserve_engine.kernels.dropout import dropout_mask, row_keys
from coserve_engine.kernels.protocol import DOWN, GATE_UP, OUTPUT, QKV
from coserve_engine.layout.batch import AdapterGroup, BatchLayout, Window
from coserve_engine.layout.passes import TileSpan
from coserve_engine.tensors.lora import Factors, LoraWeights, Pair
from coserve_engine.tensors.passes import RowDropout

LAYERS = 2
HIDDEN, QUERIES, KEYS, WIDE = 144, 96, 48, 160
SHAPES = {
    **dict.fromkeys(("q_proj",), (QUERIES, HIDDEN)),
    **dict.fromkeys(("k_proj", "v_proj"), (KEYS, HIDDEN)),
    "o_proj": (HIDDEN, QUERIES),
    **dict.fromkeys(("gate_proj", "up_proj"), (WIDE, HIDDEN)),
    "down_proj": (HIDDEN, WIDE),
}
"""(out, in) of each linear."""
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
DEVICE = CpuDevice(torch.device("cpu"))


def randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outs(group: Sequence[str]) -> tuple[int, ...]:
    return tuple(SHAPES[name][0] for name in group)


def served(seed: int, rank: int, dtype: torch.dtype, names: Sequence[str] = LINEARS) -> LoraWeights:
    """An adapter of the rank whose factors lie turned."""
    layers = []
    for layer in range(LAYERS):
        found = {}
        for n, name in enumerate(names):
            out, into = SHAPES[name]
            a = randn(seed + 100 * layer + n, rank, into, dtype=dtype) / into**0.5
            b = randn(seed + 100 * layer + n + 50, out, rank, dtype=dtype) / rank**0.5
            found[name] = Factors(a, b, 0.5 + seed % 3)
        layers.append(found)
    return LoraWeights.served(layers)


def trained(weights: LoraWeights) -> LoraWeights:
    """The same, as it lies while it trains."""

    def pair(of: Pair) -> Pair:
        a, b = of.a.contiguous(), of.b.contiguous()
        return Pair(a, b, a.t(), b.t(), of.scale)

    return LoraWeights(tuple({name: pair(of) for name, of in layer.items()} for layer in weights.layers))


@dataclass
class Request:
    weights: LoraWeights | None


@dataclass
class Rows:
    """Of a pass's layout."""

    rows: int
    spans: tuple[TileSpan, ...]


class Pass:
    """Of a pass, what adapters ask of it: sequences of these lengths."""

    def __init__(self, weights: LoraWeights, lengths: Sequence[int], p: float, seed: int = 5) -> None:
        self.weights, self.p = weights, p
        spans, base = [], 0
        for seq, length in enumerate(lengths):
            for index, start in enumerate(range(0, length, 64)):
                spans.append(TileSpan(seq, index, base, base + start, base + min(start + 64, length)))
            base += length
        self.layout = Rows(base, tuple(spans))
        self.row_keys = row_keys(seed, 1, 0, torch.arange(base))

    def drop(self, rows: slice) -> RowDropout | None:
        return RowDropout(self.row_keys[rows], self.p) if self.p else None


def layout(count: int, groups: Sequence[tuple[int, Sequence[int]]], windows: Sequence[Window] = ()) -> BatchLayout:
    """Of so many rows, those of adapters by the slot of a sequence."""
    blank: Any = ()
    rows = (0,) * count
    adapters = tuple(AdapterGroup(slot, list(members)) for slot, members in groups)
    return BatchLayout(rows, rows, rows, blank, blank, adapters, tuple(windows), blank, blank, blank, blank, count)


def added(
    x: torch.Tensor,
    weights: LoraWeights,
    layer: int,
    group: Sequence[str],
    keys: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """What an adapter adds to the group's outputs side by side, in float64."""
    parts = []
    for name in group:
        pair = weights.layers[layer].get(name)
        if pair is None:
            parts.append(torch.zeros(len(x), SHAPES[name][0], dtype=torch.float64))
            continue
        rows = x.double() * kept(keys, layer, name, x.shape[1], p)
        parts.append(pair.scale * (rows @ pair.a.double().t()) @ pair.b.double().t())
    return torch.cat(parts, 1)


def kept(keys: torch.Tensor | None, layer: int, name: str, channels: int, p: float) -> torch.Tensor:
    """What each input is multiplied by."""
    if keys is None or not p:
        return torch.ones((), dtype=torch.float64)
    return dropout_mask(keys, layer, name, channels, p).double() / (1 - p)


def requests(*weights: LoraWeights | None) -> Mapping[int, Request]:
    return {slot: Request(one) for slot, one in enumerate(weights)}
