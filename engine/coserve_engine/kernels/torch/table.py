"""The table of plain operators: sums are made in the dtype for sums, and one launch serves the decode rows of all
requests, where the CPU's words keep bits and go row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.kernels import bound
from coserve_engine.kernels.attention import Attention, reference_backward, reference_forward
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.kernels.lora import AdapterRows, add_adapters, linear
from coserve_engine.kernels.plain import PlainKernels, PlainLinear, layer_masks, layer_windows
from coserve_engine.kernels.protocol import GATE_UP, QKV, Adapted
from coserve_engine.kernels.sampling import choose, sorted_whole
from coserve_engine.kernels.torch.attention import attend_rows, hidden_keys
from coserve_engine.kernels.torch.optim import adamw
from coserve_engine.kernels.torch.products import adapter_backward, wide_product
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.adam import AdamState, AdamW
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights


@dataclass(frozen=True)
class TorchKernels(PlainKernels[BoundBatch]):
    """`Kernels` in any of `Dtypes`. `windows`: one a layer."""

    dtypes: Dtypes
    windows: tuple[int | None, ...]
    exact: bool = False
    turned: bool = False
    fused: tuple[tuple[str, ...], ...] = (QKV, GATE_UP)

    def __post_init__(self) -> None:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # parts of a split sum are sums too

    @classmethod
    def create(cls, config: ModelConfig, numerics: Numerics, dtypes: Dtypes, rope: torch.Tensor) -> Self:
        """`rope` covers the longest sequence, padding included."""
        attention = Attention(numerics, reference_forward, reference_backward, "plain products")
        windows = layer_windows(config, rope.shape[1])
        return cls(config, numerics, attention, layer_masks(config, numerics, rope), rope, dtypes, windows)

    def notes(self) -> Iterator[str]:
        yield f"kernels: torch, {self.dtypes.compute} on {self.rope.device}".replace("torch.", "")
        yield "rows may depend on their batch: torch's operators promise no bits"

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        return PlainLinear(weight, bias)

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtypes.accumulate)

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtypes.compute)

    # ---- forward ----

    def bind(
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        device: Device,
        chosen: torch.Tensor,
    ) -> BoundBatch:
        return bound.bind(layout, sequences, passes, self._shared(device, chosen), paged=True)

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: BoundBatch
    ) -> tuple[torch.Tensor, ...]:
        return self._linear(w, layer, group, x, b.adapters)

    def _linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, adapters: AdapterRows
    ) -> tuple[torch.Tensor, ...]:
        """One product for the group, where its weights are one."""
        fused = w.fused.get(group)
        if fused is None:
            return tuple([linear(x, w.linears[name], adapters, layer, name) for name in group])
        outs = [self.config.linear_shape(name)[0] for name in group]
        parts = torch.split(fused.forward(x), outs, -1)
        for name, part in zip(group, parts, strict=True):
            add_adapters(x, part, adapters, layer, name)
        return parts

    def _attend_singles(self, layer: int, q: torch.Tensor, b: BoundBatch, cache: KVCache) -> torch.Tensor:
        page, window = self.numerics.page, self.windows[layer]
        hidden = b.hidden.get(window)
        if hidden is None:
            hidden = hidden_keys(b.positions[: q.shape[0]], b.table.shape[1] * page, window)
            b.hidden[window] = hidden
        return attend_rows(q, cache.k[layer], cache.v[layer], b.table, page, hidden, self.dtypes.accumulate)

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        assert isinstance(head, PlainLinear)  # its own
        return wide_product(x, head.weight.t(), self.dtypes.accumulate)

    def sample(self, logits: torch.Tensor, b: BoundBatch, counts: TokenCounts) -> torch.Tensor:
        return choose(logits, b.choices, counts, sorted_whole)

    # ---- backward of a unit ----

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.backward(self._narrow(dlogits))

    def linear_again(
        self, w: LayerWeights, group: tuple[str, ...], x: torch.Tensor, unit: BoundUnit
    ) -> tuple[torch.Tensor, ...]:
        return self._linear(w, unit.layer, group, x, unit.adapters)

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
        dys = tuple(self._narrow(dy) for dy in dys)
        whole = w.fused.get(group, w.linears[group[0]])
        dx = whole.backward(dys[0] if len(dys) == 1 else torch.cat(dys, -1)) if need_dx else None
        for name, dy in zip(group, dys, strict=True):
            pair, grads, drop = unit.trained(name)
            if pair is not None and grads is not None:
                adapter_backward(dy, x, pair, grads, drop, dx)
        return dx

    # ---- optimizer ----

    def optimize(self, param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> torch.Tensor:
        return adamw(param, grad, state, how)
