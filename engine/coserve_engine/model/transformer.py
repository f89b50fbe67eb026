"""One layer, forward for a flat batch and backward for a unit of a pass, without autograd, in the words of `Kernels`.

Forward keeps of finetuning rows what `kept` plans; backward rebuilds the rest (norms, rotated queries, the LoRA
inputs, silu(gate) * up) and never computes a gradient of a frozen weight or bias (FlexLLM's graph pruning).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.protocol import DOWN, GATE_UP, OUTPUT, QKV, Kernels
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors, UnitRows
from coserve_engine.tensors.weights import Weights

Between = tuple[torch.Tensor, torch.Tensor | None]
"""Rows [T, H] between two layers: what the last one added, and to what; None behind the last of all, where they are
summed.
"""


@dataclass(frozen=True, slots=True)
class Transformer:
    """The model's arithmetic. Stateless but for the KV cache that is passed in."""

    config: ModelConfig
    weights: Weights
    kernels: Kernels[Any, Any]

    # ---- forward ----

    def forward(
        self, batch: Any, cache: KVCache, goes_on: Callable[[int], bool] = lambda layer: True
    ) -> torch.Tensor | None:
        """All layers for every row: keys and values to the cache, kept tensors to their passes.

        Args:
            batch: bound by the same kernels.
            goes_on: asked before each layer but the first; False ends the forward. The same forward may be begun again.

        Returns hidden [T, H], or None where it was ended.
        """
        between: Between | None = None
        for layer in range(self.config.layers):
            if layer > 0 and not goes_on(layer):
                return None
            between = self.part(layer, layer + 1, between, batch, cache)
        assert between is not None  # there is a layer
        self.kernels.keep_final(batch, between[0])
        return between[0]

    def part(self, first: int, end: int, between: Between | None, batch: Any, cache: KVCache) -> Between:
        """Layers [first, end) of `forward`, from what the one before `first` left, which is used up."""
        x, residual = (self.kernels.embed(self.weights.embed, batch), None) if between is None else between
        for layer in range(first, end):
            x, residual = self._layer(layer, x, residual, batch, cache)
        if end == self.config.layers and residual is not None:
            x, residual = self.kernels.add(x, residual), None
        return x, residual

    def _layer(
        self, layer: int, x: torch.Tensor, residual: torch.Tensor | None, batch: Any, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds to its second half's input, and that input; x + residual is the layer's own."""
        kernels, w = self.kernels, self.weights.layers[layer]
        x, xn, _ = kernels.norm(x, w.input_norm, residual)
        q, k, v = self._heads(kernels.linear(w, layer, QKV, xn, batch))
        o, lse = kernels.attend(layer, kernels.encode(w, layer, q, k, v, batch, cache), batch, cache)
        (x2,) = kernels.linear(w, layer, OUTPUT, o.flatten(1), batch)
        x2, xn2, _ = kernels.norm(x2, w.post_norm, x)
        gate, up = kernels.linear(w, layer, GATE_UP, xn2, batch)
        (y,) = kernels.linear(w, layer, DOWN, kernels.gate(gate, up), batch)
        kernels.keep(layer, batch, {"x": x, "q": q, "k": k, "o": o, "lse": lse, "x2": x2, "gate": gate, "up": up})
        return y, x2

    def _heads(self, parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """[R, heads * D] -> [R, heads, D] of each."""
        return [part.view(part.shape[0], -1, self.config.head_size) for part in parts]

    # ---- backward ----

    def backward(self, state: PassTensors, layer: int, first: int, end: int, cache: KVCache) -> None:
        """Backward of tiles [first, end) of `layer`; turns state.dx of their rows from d(output) into d(input)."""
        if end == len(state.layout.spans):
            state.dkv.zero_()
        unit = self.kernels.bind_unit(state, layer, first, end)
        dx2 = self._mlp_block_backward(unit, state.dx[unit.rows])
        dx = self._attention_block_backward(unit, dx2, cache)
        if dx is not None:
            state.dx[unit.rows] = dx

    def _mlp_block_backward(self, unit: UnitRows, dy: torch.Tensor) -> torch.Tensor:
        """dx2 of y = x2 + down(silu(gate) * up)."""
        kernels, w = self.kernels, self.weights.layers[unit.layer]
        x2, xn2, rstd = kernels.norm(self._middle(unit), w.post_norm)
        if "gate" in unit.stored:
            gate, up = unit.kept("gate"), unit.kept("up")
        else:
            gate, up = kernels.linear_again(w, GATE_UP, xn2, unit)
        h, saved = kernels.gate_again(gate, up)
        dh = _there(kernels.linear_backward(w, DOWN, (dy,), h, unit))
        dgate_up = kernels.gate_backward(dh, gate, up, saved)
        dxn2 = _there(kernels.linear_backward(w, GATE_UP, dgate_up, xn2, unit))
        return kernels.norm_backward(dxn2, x2, rstd, w.post_norm, dy)

    def _middle(self, unit: UnitRows) -> torch.Tensor:
        """The input of the MLP's half, kept or computed again."""
        if "x2" in unit.stored:
            return unit.kept("x2")
        w = self.weights.layers[unit.layer]
        (x2,) = self.kernels.linear_again(w, OUTPUT, unit.kept("o").flatten(1), unit)
        return self.kernels.add(x2, unit.kept("x"))

    def _queries_keys(self, unit: UnitRows, xn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, and keys where they are normalised, before norm and rotation, kept or computed again of xn."""
        wants_k = self.config.qk_norm
        if "q" in unit.stored:
            return unit.kept("q"), unit.kept("k") if wants_k else None
        names = ("q_proj", "k_proj") if wants_k else ("q_proj",)
        q, *k = self._heads(self.kernels.linear_again(self.weights.layers[unit.layer], names, xn, unit))
        return q, k[0] if k else None

    def _attention_block_backward(self, unit: UnitRows, dx2: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        """dx of x2 = x + o_proj(attention); None in the first layer, below which nothing learns."""
        kernels, w, below = self.kernels, self.weights.layers[unit.layer], unit.layer > 0
        o = unit.kept("o")
        x, xn, rstd = kernels.norm(unit.kept("x"), w.input_norm)
        q, k = self._queries_keys(unit, xn)
        do = _there(kernels.linear_backward(w, OUTPUT, (dx2,), o.flatten(1), unit)).view_as(o)
        dq = kernels.attend_backward(kernels.encode_again(w, q, unit), do, unit, cache)
        parts = tuple(d.flatten(1) for d in kernels.encode_backward(w, dq, q, k, unit))
        dxn = kernels.linear_backward(w, QKV, parts, xn, unit, need_dx=below)
        return None if dxn is None else kernels.norm_backward(dxn, x, rstd, w.input_norm, dx2)


def _there(dx: torch.Tensor | None) -> torch.Tensor:
    """A gradient that was asked for."""
    assert dx is not None
    return dx
