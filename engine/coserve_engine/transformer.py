"""One layer, forward for a flat batch and backward for a unit of a pass, without autograd.

Forward keeps {x, x2, q, o, lse, gate, up} of finetuning rows; backward rebuilds the rest (norms, the LoRA inputs,
silu(gate) * up) and never computes a gradient of a frozen weight (FlexLLM's graph pruning).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from coserve_engine.attention import attend, attend_backward, causal_bias
from coserve_engine.batch import BoundBatch, page_row
from coserve_engine.config import ModelConfig
from coserve_engine.functional import rms_norm, rms_norm_backward, rope_table, rotate, swiglu_backward
from coserve_engine.lora import linear, linear_backward
from coserve_engine.numerics import Numerics
from coserve_engine.passes import PassState, TileSpan
from coserve_engine.weights import Weights


class KVCache:
    """Paged keys and values: two pools [layers, KVH, pages * page, D]. Zeroed at first: masked tails must be finite."""

    def __init__(
        self, config: ModelConfig, pages: int, numerics: Numerics, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.layers, config.kv_heads, pages * numerics.page, config.head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._page = numerics.page

    @staticmethod
    def page_bytes(config: ModelConfig, numerics: Numerics, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values of all layers."""
        return 2 * config.layers * config.kv_heads * config.head_size * numerics.page * dtype.itemsize

    def write(self, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, KVH, D] at flat positions `index` [T]."""
        self.k[layer].index_copy_(1, index, k.transpose(0, 1))
        self.v[layer].index_copy_(1, index, v.transpose(0, 1))

    def read(self, layer: int, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [KVH, length, D] of `pages` [n]."""

        def gather(pool: torch.Tensor) -> torch.Tensor:
            heads, _, size = pool.shape
            rows = pool.view(heads, -1, self._page, size).index_select(1, pages)
            return rows.view(heads, -1, size)[:, :length]

        return gather(self.k[layer]), gather(self.v[layer])

    def scrub(self, pages: tuple[int, ...]) -> None:
        """Zero pages that may hold values which are not finite: a masked key still meets 0 * value."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.k.device)
        for pool in (self.k, self.v):
            layers, heads, _, size = pool.shape
            pool.view(layers, heads, -1, self._page, size).index_fill_(2, index, 0.0)


@dataclass(frozen=True, slots=True)
class Transformer:
    """The model's arithmetic. Stateless but for the KV cache that is passed in."""

    config: ModelConfig
    weights: Weights
    numerics: Numerics
    bias: torch.Tensor
    rope: torch.Tensor

    @classmethod
    def create(cls, config: ModelConfig, weights: Weights, numerics: Numerics, positions: int) -> Transformer:
        """`positions`: the longest sequence, padding included."""
        dtype, device = weights.embed.dtype, weights.embed.device
        bias = causal_bias(numerics.tile, dtype, device)
        return cls(
            config, weights, numerics, bias, rope_table(config.rope_theta, config.head_size, positions, dtype, device)
        )

    def forward(self, batch: BoundBatch, cache: KVCache) -> torch.Tensor:
        """All layers for every row: keys and values to the cache, kept tensors to their passes.

        Returns hidden [T, H].
        """
        x = self.weights.embed[batch.tokens]
        cos, sin = self.rope[:, batch.positions].unsqueeze(2)
        for layer in range(self.config.layers):
            x = self._layer(layer, x, batch, cache, cos, sin)
        for rows in batch.kept:
            rows.state.final[rows.first : rows.first + rows.stop - rows.start] = x[rows.start : rows.stop]
        return x

    def _layer(
        self, layer: int, x: torch.Tensor, batch: BoundBatch, cache: KVCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        config, w, groups = self.config, self.weights.layers[layer], batch.groups
        xn, _ = rms_norm(x, w.input_norm, config.rms_eps)
        q, k, v = (linear(xn, w.linears[n], groups, layer, n) for n in ("q_proj", "k_proj", "v_proj"))
        q = rotate(q.view(-1, config.heads, config.head_size), cos, sin)
        k = rotate(k.view(-1, config.kv_heads, config.head_size), cos, sin)
        cache.write(layer, batch.write_index, k, v.view(-1, config.kv_heads, config.head_size))
        o = torch.zeros_like(q)
        for call in batch.calls:
            keys, values = cache.read(layer, call.pages, call.kv_length)
            rows = q[call.start : call.stop]
            out, lse = attend(rows, keys, values, self.bias, call.first, call.padded, want_lse=call.keep is not None)
            o[call.start : call.stop] = out
            if call.keep is not None and lse is not None:
                state, first = call.keep
                span = slice(first, first + call.stop - call.start)
                state.kept[layer]["q"][span], state.kept[layer]["o"][span] = rows, out
                state.kept[layer]["lse"][span] = lse
        x2 = x + linear(o.flatten(1), w.linears["o_proj"], groups, layer, "o_proj")
        xn2, _ = rms_norm(x2, w.post_norm, config.rms_eps)
        gate = linear(xn2, w.linears["gate_proj"], groups, layer, "gate_proj")
        up = linear(xn2, w.linears["up_proj"], groups, layer, "up_proj")
        y = x2 + linear(functional.silu(gate) * up, w.linears["down_proj"], groups, layer, "down_proj")
        for kept in batch.kept:
            if kept.state.training:
                store = kept.state.kept[layer]
                span = slice(kept.first, kept.first + kept.stop - kept.start)
                for name, value in (("x", x), ("x2", x2), ("gate", gate), ("up", up)):
                    store[name][span] = value[kept.start : kept.stop]
        return y

    def backward(self, state: PassState, layer: int, first: int, end: int, cache: KVCache) -> None:
        """Backward of tiles [first, end) of `layer`; turns state.dx of their rows from d(output) into d(input)."""
        config, w, kept = self.config, self.weights.layers[layer], state.kept[layer]
        if end == len(state.spans):
            state.dkv.zero_()
        start, stop = state.spans[first].start, state.spans[end - 1].stop
        spans = tuple(reversed(state.spans[first:end]))
        tiles = tuple((s.start - start, s.stop - start) for s in spans)
        rows = slice(start, stop)
        pairs, grads, scale = state.weights.layers[layer], state.grad_views[layer], state.weights.scale

        def back(name: str, dy: torch.Tensor, x: torch.Tensor, need_dx: bool = True) -> torch.Tensor | None:
            weight = w.linears[name]
            return linear_backward(dy, x, weight, pairs.get(name), grads.get(name), scale, tiles, need_dx=need_dx)

        dy, x, x2, gate, up = state.dx[rows], kept["x"][rows], kept["x2"][rows], kept["gate"][rows], kept["up"][rows]
        dh = back("down_proj", dy, functional.silu(gate) * up)
        assert dh is not None
        dgate, dup = swiglu_backward(dh, gate, up)
        xn2, rstd2 = rms_norm(x2, w.post_norm, config.rms_eps)
        dxn2 = _sum(back("gate_proj", dgate, xn2), back("up_proj", dup, xn2))
        dx2 = dy + rms_norm_backward(dxn2, x2, rstd2, w.post_norm)
        do = back("o_proj", dx2, kept["o"][rows].flatten(1))
        assert do is not None
        dq = self._attention_backward(state, layer, spans, do.view(-1, config.heads, config.head_size), start, cache)
        cos, sin = self.rope[:, state.positions[rows]].unsqueeze(2)
        dk = rotate(state.dkv[0][:, rows].transpose(0, 1), cos, -sin).flatten(1)
        dv = state.dkv[1][:, rows].transpose(0, 1).flatten(1)
        dq = rotate(dq, cos, -sin).flatten(1)
        xn, rstd = rms_norm(x, w.input_norm, config.rms_eps)
        below = layer > 0
        parts = [back(n, d, xn, below) for n, d in (("q_proj", dq), ("k_proj", dk), ("v_proj", dv))]
        if below:
            state.dx[rows] = dx2 + rms_norm_backward(_sum(*parts), x, rstd, w.input_norm)

    def _attention_backward(
        self, state: PassState, layer: int, spans: tuple[TileSpan, ...], do: torch.Tensor, start: int, cache: KVCache
    ) -> torch.Tensor:
        kept = state.kept[layer]
        dq = torch.empty_like(do)
        for span in spans:
            tile_end = (span.index + 1) * self.numerics.tile
            pages = page_row(state.page_tables[span.seq], tile_end, self.numerics)
            k, v = cache.read(layer, torch.tensor(pages, device=do.device), tile_end)
            rows, local = slice(span.start, span.stop), slice(span.start - start, span.stop - start)
            dk, dv = state.dkv[:, :, span.base : span.stop]
            q, o, lse = kept["q"][rows], kept["o"][rows], kept["lse"][rows]
            dq[local] = attend_backward(do[local], q, o, lse, k, v, self.bias, dk, dv)
        return dq


def _sum(*parts: torch.Tensor | None) -> torch.Tensor:
    present = [part for part in parts if part is not None]
    total = present[0]
    for part in present[1:]:
        total = total + part
    return total
