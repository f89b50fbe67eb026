"""The table of a CPU: every word by torch's operators, in an order that keeps a row's bits its sequence's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.kernels import bound
from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.kernels.cpu.linears import LinearChoice
from coserve_engine.kernels.cpu.optim import adamw
from coserve_engine.kernels.lora import linear, linear_backward
from coserve_engine.kernels.plain import PlainKernels, layer_masks
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.kernels.sampling import choose, widening
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.adam import AdamState, AdamW
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.kv_cache import KVCache, Reader
from coserve_engine.tensors.passes import PassTensors
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights


@dataclass(frozen=True)
class CpuKernels(PlainKernels[BoundBatch]):
    """`Kernels` in float32 or float64."""

    linears: LinearChoice
    exact: bool = True
    turned: bool = True
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
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        device: Device,
        chosen: torch.Tensor,
    ) -> BoundBatch:
        return bound.bind(layout, sequences, passes, self._shared(device, chosen), paged=False)

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: BoundBatch
    ) -> tuple[torch.Tensor, ...]:
        return tuple([linear(x, w.linears[name], b.adapters, layer, name) for name in group])

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

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.forward(x)

    def sample(self, logits: torch.Tensor, b: BoundBatch, counts: TokenCounts) -> torch.Tensor:
        return choose(logits, b.choices, counts, widening)

    # ---- backward of a unit ----

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.backward(dlogits)

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
            pair, grads, drop = unit.trained(name)
            part = linear_backward(dy, x, w.linears[name], pair, grads, unit.tiles, drop, need_dx=need_dx)
            if total is None:
                total = part
            elif part is not None:
                total += part
        return total

    # ---- optimizer ----

    def optimize(self, param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> torch.Tensor:
        norm, changed = adamw(param, grad, state, how)
        return torch.tensor([norm, float(changed)], dtype=torch.float64)
