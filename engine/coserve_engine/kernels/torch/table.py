"""The table of plain operators: sums are made in the dtype for sums, and one launch serves the decode rows of all
requests, where the CPU's words keep bits and go row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn import functional

from coserve_engine.config import ModelConfig
from coserve_engine.kernels import bound
from coserve_engine.kernels.attention import Attention, reference_backward, reference_forward
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.kernels.dropout import dropout
from coserve_engine.kernels.functional import (
    encode_heads,
    encode_heads_backward,
    rms_norm,
    rms_norm_backward,
    swiglu_backward,
)
from coserve_engine.kernels.lora import AdapterRows, add_adapters, linear
from coserve_engine.kernels.plain import PlainKernels, layer_masks, layer_windows
from coserve_engine.kernels.protocol import GATE_UP, QKV, Adapted
from coserve_engine.kernels.torch.attention import attend_rows, hidden_keys
from coserve_engine.kernels.torch.products import TorchLinear, adapter_backward, wide_product
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights


@dataclass(frozen=True)
class DecodedBatch(BoundBatch):
    """With the pages [n, pages] of the n decode rows, null pages where a sequence has fewer, and by a window what these
    do not see of them, made when first asked for.
    """

    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    hidden: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TorchKernels(PlainKernels[DecodedBatch]):
    """`Kernels` in any of `Dtypes`. `windows`: one a layer."""

    dtypes: Dtypes
    windows: tuple[int | None, ...]
    exact: bool = False
    fused: tuple[tuple[str, ...], ...] = (QKV, GATE_UP)

    @classmethod
    def create(cls, config: ModelConfig, numerics: Numerics, dtypes: Dtypes, rope: torch.Tensor) -> TorchKernels:
        """`rope` covers the longest sequence, padding included."""
        attention = Attention(numerics, reference_forward, reference_backward, "plain products")
        windows = layer_windows(config, rope.shape[1])
        return cls(config, numerics, attention, layer_masks(config, numerics, rope), rope, dtypes, windows)

    def notes(self) -> Iterator[str]:
        yield f"kernels: torch, {self.dtypes.compute} on {self.rope.device}".replace("torch.", "")
        yield "rows may depend on their batch: torch's operators promise no bits"

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        return TorchLinear(weight, bias)

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtypes.accumulate)

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtypes.compute)

    # ---- forward ----

    def bind(
        self, layout: BatchLayout, sequences: Mapping[int, Adapted], passes: Mapping[int, PassTensors]
    ) -> DecodedBatch:
        pages = [call.pages for call in layout.singles]
        longest = max(map(len, pages), default=0)
        table = [[*some, *([NULL_PAGE] * (longest - len(some)))] for some in pages]
        made = bound.bind(replace(layout, singles=()), sequences, passes, self.numerics, self.rope)
        return DecodedBatch(
            layout,
            made.tokens,
            made.positions,
            made.write,
            (),
            made.calls,
            made.adapters,
            made.kept,
            made.sample_rows,
            made.rope,
            table=torch.tensor(table, dtype=torch.int64, device=self.rope.device),
        )

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if residual is not None:
            x = x.add_(residual)
        normed, rstd = rms_norm(self._wide(x), weight, self.config.rms_eps)
        return x, self._narrow(normed), rstd

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: DecodedBatch
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

    def encode(
        self,
        w: LayerWeights,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        b: DecodedBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        (cos, sin), eps = b.angles, self.config.rms_eps
        keys = encode_heads(self._wide(k), w.k_norm, eps, cos, sin)
        cache.write(layer, b.write, keys.to(self.dtypes.cache), v.to(self.dtypes.cache))
        return self._narrow(encode_heads(self._wide(q), w.q_norm, eps, cos, sin))

    def _attend_singles(self, layer: int, q: torch.Tensor, b: DecodedBatch, cache: KVCache) -> torch.Tensor:
        page, window = self.numerics.page, self.windows[layer]
        hidden = b.hidden.get(window)
        if hidden is None:
            hidden = hidden_keys(b.positions[: q.shape[0]], b.table.shape[1] * page, window)
            b.hidden[window] = hidden
        return attend_rows(q, cache.k[layer], cache.v[layer], b.table, page, hidden, self.dtypes.accumulate)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._narrow(functional.silu(self._wide(gate)).mul_(up))

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        assert isinstance(head, TorchLinear)  # its own
        return wide_product(x, head.weight.t(), self.dtypes.accumulate)

    # ---- backward of a unit ----

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        return head.backward(self._narrow(dlogits))

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dx = rms_norm_backward(self._wide(dy), self._wide(x), rstd, weight)
        return self._narrow(dx if residual is None else dx.add_(residual))

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
            self._adapter_backward(name, dy, x, unit, dx)
        return dx

    def _adapter_backward(
        self, name: str, dy: torch.Tensor, x: torch.Tensor, unit: BoundUnit, dx: torch.Tensor | None
    ) -> None:
        """Adds to the adapter's gradients and, where it is wanted, to dx."""
        state, layer = unit.state, unit.layer
        pair, grads = state.weights.layers[layer].get(name), state.grad_views[layer].get(name)
        if pair is not None and grads is not None:
            mask = state.drop(unit.rows)
            drop = None if mask is None else partial(dropout, rows=mask.keys, layer=layer, linear=name, p=mask.p)
            adapter_backward(dy, x, pair, grads, drop, dx)

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: BoundUnit) -> torch.Tensor:
        return self._narrow(encode_heads(self._wide(q), w.q_norm, self.config.rms_eps, *unit.angles))

    def encode_backward(
        self, w: LayerWeights, dq: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None, unit: BoundUnit
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (cos, sin), eps = unit.angles, self.config.rms_eps
        dk, dv = (part[:, unit.rows].transpose(0, 1) for part in unit.state.dkv)
        before = None if k is None else self._wide(k)
        dq = encode_heads_backward(dq, self._wide(q), w.q_norm, eps, cos, sin)
        return dq, encode_heads_backward(dk, before, w.k_norm, eps, cos, sin), dv

    def gate_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        silu = functional.silu(self._wide(gate))
        return self._narrow(silu * up), silu

    def gate_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, saved: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dgate, dup = swiglu_backward(self._wide(dh), self._wide(gate), self._wide(up), saved)
        return self._narrow(dgate), self._narrow(dup)
