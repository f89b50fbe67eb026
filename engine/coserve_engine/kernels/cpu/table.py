"""The table of a CPU: every word by torch's operators, in an order that keeps a row's bits its sequence's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from coserve_engine.config import ModelConfig
from coserve_engine.kernels import bound
from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.kernels.cpu.linears import LinearChoice
from coserve_engine.kernels.dropout import dropout
from coserve_engine.kernels.functional import (
    encode_heads,
    encode_heads_backward,
    rms_norm,
    rms_norm_backward,
    swiglu_backward,
)
from coserve_engine.kernels.lora import linear, linear_backward
from coserve_engine.kernels.plain import PlainKernels, layer_masks
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import KVCache, Reader
from coserve_engine.tensors.passes import PassTensors
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights


@dataclass(frozen=True)
class CpuKernels(PlainKernels[BoundBatch]):
    """`Kernels` in float32 or float64."""

    linears: LinearChoice
    exact: bool = True
    fused: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def create(cls, config: ModelConfig, numerics: Numerics, rope: torch.Tensor, *, backward: bool) -> CpuKernels:
        """`rope` covers the longest sequence, padding included; `backward`: whether there will be any."""
        linears = LinearChoice(rope.device, rope.dtype, numerics, backward=backward)
        masks = layer_masks(config, numerics, rope)
        return cls(config, numerics, Attention.select(numerics, rope.device), masks, rope, linears)

    def notes(self) -> Iterator[str]:
        yield f"kernels: cpu, {self.rope.dtype}".replace("torch.", "")
        yield from self.linears.notes()
        yield f"attention by {self.attention.name}"

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        return self.linears.make(weight, bias)

    # ---- forward ----

    def bind(
        self, layout: BatchLayout, sequences: Mapping[int, Adapted], passes: Mapping[int, PassTensors]
    ) -> BoundBatch:
        return bound.bind(layout, sequences, passes, self.numerics, self.rope)

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if residual is not None:
            x = x.add_(residual)
        return (x, *rms_norm(x, weight, self.config.rms_eps))

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: BoundBatch
    ) -> tuple[torch.Tensor, ...]:
        return tuple([linear(x, w.linears[name], b.adapters, layer, name) for name in group])

    def encode(
        self,
        w: LayerWeights,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        b: BoundBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        (cos, sin), eps = b.angles, self.config.rms_eps
        cache.write(layer, b.write, encode_heads(k, w.k_norm, eps, cos, sin), v)
        return encode_heads(q, w.q_norm, eps, cos, sin)

    def _attend_singles(self, layer: int, q: torch.Tensor, b: BoundBatch, cache: KVCache) -> torch.Tensor:
        mask = self.masks[layer]
        keys = [read(layer) for read in self._readers(mask, b, cache)]
        return self.attention.attend_singles(q, keys, mask, tuple(call.first for call in b.layout.singles))

    def _readers(self, mask: Mask, b: BoundBatch, cache: KVCache) -> tuple[Reader, ...]:
        """What decode rows see of the cache, in all layers with this mask."""
        found = b.readers.get(mask.reach)
        if found is None:
            calls = zip(b.layout.singles, b.singles, strict=True)
            found = tuple(cache.reader(run, mask.first_key(call.tile_end), call.tile_end) for call, run in calls)
            b.readers[mask.reach] = found
        return found

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate).mul_(up)

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.forward(x)

    # ---- backward of a unit ----

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.backward(dlogits)

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dx = rms_norm_backward(dy, x, rstd, weight)
        return dx if residual is None else dx.add_(residual)

    def linear_again(
        self, w: LayerWeights, group: tuple[str, ...], x: torch.Tensor, unit: BoundUnit
    ) -> tuple[torch.Tensor, ...]:
        return tuple([linear(x, w.linears[name], unit.adapters, unit.layer, name) for name in group])

    def linear_backward(
        self,
        w: LayerWeights,
        group: tuple[str, ...],
        dys: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        unit: BoundUnit,
        *,
        need_dx: bool = True,
    ) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for name, dy in zip(group, dys, strict=True):
            part = self._linear_backward(w, name, dy, x, unit, need_dx=need_dx)
            if total is None:
                total = part
            elif part is not None:
                total += part
        return total

    def _linear_backward(
        self, w: LayerWeights, name: str, dy: torch.Tensor, x: torch.Tensor, unit: BoundUnit, *, need_dx: bool
    ) -> torch.Tensor | None:
        state, layer = unit.state, unit.layer
        pair, grads = state.weights.layers[layer].get(name), state.grad_views[layer].get(name)
        mask = state.drop(unit.rows)
        drop = None if mask is None else partial(dropout, rows=mask.keys, layer=layer, linear=name, p=mask.p)
        return linear_backward(dy, x, w.linears[name], pair, grads, unit.tiles, drop, need_dx=need_dx)

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: BoundUnit) -> torch.Tensor:
        return encode_heads(q, w.q_norm, self.config.rms_eps, *unit.angles)

    def encode_backward(
        self, w: LayerWeights, dq: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None, unit: BoundUnit
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (cos, sin), eps = unit.angles, self.config.rms_eps
        dk, dv = (part[:, unit.rows].transpose(0, 1) for part in unit.state.dkv)
        dq = encode_heads_backward(dq, q, w.q_norm, eps, cos, sin)
        return dq, encode_heads_backward(dk, k, w.k_norm, eps, cos, sin), dv

    def gate_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        silu = functional.silu(gate)
        return silu * up, silu

    def gate_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, saved: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return swiglu_backward(dh, gate, up, saved)
