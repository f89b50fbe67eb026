"""One layer, forward for a flat batch and backward for a unit of a pass, without autograd.

Forward keeps of finetuning rows what `kept` plans; backward rebuilds the rest (norms, rotated queries, the LoRA
inputs, silu(gate) * up) and never computes a gradient of a frozen weight or bias (FlexLLM's graph pruning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.cpu.attention import Attention, Mask
from coserve_engine.kernels.cpu.bound import BoundBatch
from coserve_engine.kernels.cpu.dropout import dropout
from coserve_engine.kernels.cpu.functional import (
    encode_heads,
    encode_heads_backward,
    rms_norm,
    rms_norm_backward,
    swiglu_backward,
)
from coserve_engine.kernels.cpu.lora import AdapterRows, linear, linear_backward, unit_adapters
from coserve_engine.model.rope import rope_table
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import KVCache, PageRun, Reader
from coserve_engine.tensors.passes import PassTensors, UnitRows
from coserve_engine.tensors.weights import Weights

QKV = ("q_proj", "k_proj", "v_proj")
Singles = Mapping[int | None, tuple[Reader, ...]]
"""A mask's reach -> readers of the decode rows' keys and values."""


@dataclass(frozen=True, slots=True)
class Transformer:
    """The model's arithmetic. Stateless but for the KV cache that is passed in.

    Args:
        masks: one a layer.
        rope: `rope_table`.
    """

    config: ModelConfig
    weights: Weights
    numerics: Numerics
    attention: Attention
    masks: tuple[Mask, ...]
    rope: torch.Tensor

    @classmethod
    def create(cls, config: ModelConfig, weights: Weights, numerics: Numerics, positions: int) -> Transformer:
        """`positions`: the longest sequence, padding included."""
        dtype, device = weights.embed.dtype, weights.embed.device
        windows = tuple(None if window is None or window >= positions else window for window in config.windows)
        group = config.heads // config.kv_heads
        masks = {w: Mask.create(numerics, group, positions, w, dtype, device) for w in set(windows)}
        attention = Attention.select(numerics, device)
        rope = rope_table(config.rope, config.head_size, positions, dtype, device)
        return cls(config, weights, numerics, attention, tuple(masks[window] for window in windows), rope)

    # ---- forward ----

    def forward(
        self, batch: BoundBatch, cache: KVCache, goes_on: Callable[[int], bool] = lambda layer: True
    ) -> torch.Tensor | None:
        """All layers for every row: keys and values to the cache, kept tensors to their passes.

        Args:
            goes_on: asked before each layer but the first; False ends the forward. The same forward may be begun again.

        Returns hidden [T, H], or None where it was ended.
        """
        x = self.weights.embed[batch.tokens]
        cos, sin = self.rope[:, batch.positions].unsqueeze(2)
        singles = {reach: self._readers(mask, batch, cache) for reach, mask in {m.reach: m for m in self.masks}.items()}
        for layer in range(self.config.layers):
            if layer > 0 and not goes_on(layer):
                return None
            x = self._layer(layer, x, batch, cache, singles, cos, sin)
        for rows in batch.kept:
            rows.state.final[rows.first : rows.first + rows.stop - rows.start] = x[rows.start : rows.stop]
        return x

    def _readers(self, mask: Mask, batch: BoundBatch, cache: KVCache) -> tuple[Reader, ...]:
        """What decode rows see of the cache, in the layers with this mask."""
        calls = zip(batch.layout.singles, batch.singles, strict=True)
        return tuple(cache.reader(run, mask.first_key(call.tile_end), call.tile_end) for call, run in calls)

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,
        batch: BoundBatch,
        cache: KVCache,
        singles: Singles,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        w, adapters, eps = self.weights.layers[layer], batch.adapters, self.config.rms_eps
        q, k, v = self._project(layer, x, adapters)
        cache.write(layer, batch.write, encode_heads(k, w.k_norm, eps, cos, sin), v)
        o, lse = self._attention(layer, encode_heads(q, w.q_norm, eps, cos, sin), batch, cache, singles)
        x2 = self._linear(layer, "o_proj", o.flatten(1), adapters).add_(x)
        gate, up = self._gate_up(layer, x2, adapters)
        y = self._linear(layer, "down_proj", functional.silu(gate).mul_(up), adapters).add_(x2)
        _keep(layer, batch, {"x": x, "q": q, "k": k, "o": o, "lse": lse, "x2": x2, "gate": gate, "up": up})
        return y

    def _linear(self, layer: int, name: str, x: torch.Tensor, adapters: AdapterRows) -> torch.Tensor:
        return linear(x, self.weights.layers[layer].linears[name], adapters, layer, name)

    def _project(
        self, layer: int, x: torch.Tensor, adapters: AdapterRows, names: tuple[str, ...] = QKV
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [R, heads, D] of x [R, H], before their norms and rotation."""
        xn, _ = rms_norm(x, self.weights.layers[layer].input_norm, self.config.rms_eps)
        parts = (self._linear(layer, name, xn, adapters) for name in names)
        return tuple(part.view(x.shape[0], -1, self.config.head_size) for part in parts)

    def _gate_up(self, layer: int, x2: torch.Tensor, adapters: AdapterRows) -> tuple[torch.Tensor, ...]:
        """gate and up [R, I] of x2 [R, H]."""
        xn2, _ = rms_norm(x2, self.weights.layers[layer].post_norm, self.config.rms_eps)
        return tuple(self._linear(layer, name, xn2, adapters) for name in ("gate_proj", "up_proj"))

    def _attention(
        self, layer: int, q: torch.Tensor, batch: BoundBatch, cache: KVCache, singles: Singles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o [T, heads, D] of encoded queries, and the log-sum-exp [T, heads] of rows that a pass keeps."""
        mask, o, lse = self.masks[layer], torch.zeros_like(q), q.new_zeros(q.shape[:2])
        if batch.singles:
            keys = [read(layer) for read in singles[mask.reach]]
            firsts = tuple(call.first for call in batch.layout.singles)
            o[: len(keys)] = self.attention.attend_singles(q[: len(keys)], keys, mask, firsts)
        for call, run in zip(batch.layout.calls, batch.calls, strict=True):
            k, v = cache.read(layer, run, mask.first_key(call.tile_end), call.tile_end)
            rows = slice(call.start, call.stop)
            o[rows], sums = self.attention.attend(q[rows], k, v, mask, call.first)
            if call.want_lse:
                lse[rows] = sums
        return o, lse

    # ---- backward ----

    def backward(self, state: PassTensors, layer: int, first: int, end: int, cache: KVCache) -> None:
        """Backward of tiles [first, end) of `layer`; turns state.dx of their rows from d(output) into d(input)."""
        if end == len(state.layout.spans):
            state.dkv.zero_()
        unit = UnitRows.of(state, layer, first, end)
        dx2 = self._mlp_block_backward(unit, state.dx[unit.rows])
        dx = self._attention_block_backward(unit, dx2, cache)
        if dx is not None:
            state.dx[unit.rows] = dx

    def _linear_backward(
        self, unit: UnitRows, name: str, dy: torch.Tensor, x: torch.Tensor, *, need_dx: bool = True
    ) -> torch.Tensor | None:
        state, weight = unit.state, self.weights.layers[unit.layer].linears[name]
        pair, grads = state.weights.layers[unit.layer].get(name), state.grad_views[unit.layer].get(name)
        mask = state.drop(unit.rows)
        drop = None if mask is None else partial(dropout, rows=mask.keys, layer=unit.layer, linear=name, p=mask.p)
        return linear_backward(dy, x, weight, pair, grads, unit.tiles, drop, need_dx=need_dx)

    def _mlp_block_backward(self, unit: UnitRows, dy: torch.Tensor) -> torch.Tensor:
        """dx2 of y = x2 + down(silu(gate) * up)."""
        norm, x2 = self.weights.layers[unit.layer].post_norm, self._middle(unit)
        if "gate" in unit.stored:
            gate, up = unit.kept("gate"), unit.kept("up")
        else:
            gate, up = self._gate_up(unit.layer, x2, unit_adapters(unit))
        silu = functional.silu(gate)
        dh = _sum(self._linear_backward(unit, "down_proj", dy, silu * up))
        dgate, dup = swiglu_backward(dh, gate, up, silu)
        xn2, rstd = rms_norm(x2, norm, self.config.rms_eps)
        ends = (("gate_proj", dgate), ("up_proj", dup))
        dxn2 = _sum(*(self._linear_backward(unit, name, d, xn2) for name, d in ends))
        return rms_norm_backward(dxn2, x2, rstd, norm).add_(dy)

    def _middle(self, unit: UnitRows) -> torch.Tensor:
        """The input of the MLP's half, kept or computed again."""
        if "x2" in unit.stored:
            return unit.kept("x2")
        adapters = unit_adapters(unit)
        return self._linear(unit.layer, "o_proj", unit.kept("o").flatten(1), adapters).add_(unit.kept("x"))

    def _queries_keys(self, unit: UnitRows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, and keys where they are normalised, before norm and rotation, kept or computed again."""
        wants_k = self.config.qk_norm
        if "q" in unit.stored:
            return unit.kept("q"), unit.kept("k") if wants_k else None
        names = ("q_proj", "k_proj") if wants_k else ("q_proj",)
        q, *k = self._project(unit.layer, unit.kept("x"), unit_adapters(unit), names)
        return q, k[0] if k else None

    def _attention_block_backward(self, unit: UnitRows, dx2: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        """dx of x2 = x + o_proj(attention); None in the first layer, below which nothing learns."""
        w, state, eps = self.weights.layers[unit.layer], unit.state, self.config.rms_eps
        x, o = unit.kept("x"), unit.kept("o")
        q, k = self._queries_keys(unit)
        cos, sin = self.rope[:, state.positions[unit.rows]].unsqueeze(2)
        do = _sum(self._linear_backward(unit, "o_proj", dx2, o.flatten(1))).view_as(o)
        dq = self._attention_backward(unit, encode_heads(q, w.q_norm, eps, cos, sin), do, cache)
        dk, dv = (part[:, unit.rows].transpose(0, 1) for part in state.dkv)
        dq = encode_heads_backward(dq, q, w.q_norm, eps, cos, sin)
        dk = encode_heads_backward(dk, k, w.k_norm, eps, cos, sin)
        xn, rstd = rms_norm(x, w.input_norm, eps)
        below = unit.layer > 0
        ends = (("q_proj", dq), ("k_proj", dk), ("v_proj", dv))
        parts = [self._linear_backward(unit, name, d.flatten(1), xn, need_dx=below) for name, d in ends]
        return rms_norm_backward(_sum(*parts), x, rstd, w.input_norm).add_(dx2) if below else None

    def _attention_backward(self, unit: UnitRows, q: torch.Tensor, do: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """dq [R, heads, D] of encoded queries; adds to state.dkv, encoded keys and values, tile by tile."""
        state, mask, dq = unit.state, self.masks[unit.layer], torch.empty_like(do)
        o, lse = unit.kept("o"), unit.kept("lse")
        for span, pages, (start, stop) in zip(unit.spans, unit.pages, unit.tiles, strict=True):
            tile_end = (span.index + 1) * self.numerics.tile
            first_key = mask.first_key(tile_end)
            k, v = cache.read(unit.layer, PageRun.of(pages, q.device), first_key, tile_end)
            dk, dv = state.dkv[:, :, span.base + first_key : span.stop]
            rows = slice(start, stop)
            part = (do[rows], q[rows], o[rows], lse[rows])
            dq[rows] = self.attention.attend_backward(*part, k, v, mask, dk, dv)
        return dq


def _keep(layer: int, batch: BoundBatch, values: Mapping[str, torch.Tensor]) -> None:
    """Copy what passes of this batch keep of `values` [T, ...]."""
    for rows in batch.kept:
        if rows.state.layout.training:
            for name, store in rows.state.kept[layer].items():
                store[rows.first : rows.first + rows.stop - rows.start] = values[name][rows.start : rows.stop]


def _sum(*parts: torch.Tensor | None) -> torch.Tensor:
    """In the place of the first that is there."""
    total, *rest = (part for part in parts if part is not None)
    for part in rest:
        total += part
    return total
