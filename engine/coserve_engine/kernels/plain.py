"""Words of `Kernels` that torch's operators say alike on any device; a table adds those in which devices differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.nn import functional

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.kernels.bound import BoundBatch, BoundUnit, Shared
from coserve_engine.kernels.functional import (
    encode_heads,
    encode_heads_backward,
    log_probabilities,
    rms_norm,
    rms_norm_backward,
    swiglu_backward,
)
from coserve_engine.kernels.protocol import Graphs, Mixed
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors, UnitRows
from coserve_engine.tensors.weights import LayerWeights

B = TypeVar("B", bound=BoundBatch)


def layer_windows(config: ModelConfig, positions: int) -> tuple[int | None, ...]:
    """Of each layer; None where it is longer than the longest sequence."""
    return tuple(None if window is None or window >= positions else window for window in config.windows)


def layer_masks(config: ModelConfig, numerics: Numerics, rope: torch.Tensor) -> tuple[Mask, ...]:
    """One a layer, for sequences that `rope` covers and in its dtype."""
    windows = layer_windows(config, rope.shape[1])
    group, positions = config.heads // config.kv_heads, rope.shape[1]
    masks = {w: Mask.create(numerics, group, positions, w, rope.dtype, rope.device) for w in set(windows)}
    return tuple(masks[window] for window in windows)


class PlainLinear:
    """A frozen weight by torch's own products: the definition, for any device and dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        return dy @ self.weight


@dataclass(frozen=True)
class PlainKernels(Generic[B]):
    """`masks`: one a layer, in the dtype of sums over keys; `rope`: `rope_table`."""

    config: ModelConfig
    numerics: Numerics
    attention: Attention
    masks: tuple[Mask, ...]
    rope: torch.Tensor

    @property
    def graphs(self) -> Graphs[B] | None:
        return None

    @property
    def mixed(self) -> Mixed[B] | None:
        return None

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of sums; here all is computed in one."""
        return x

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype in which rows are multiplied and kept."""
        return x

    # ---- forward ----

    def embed(self, table: torch.Tensor, b: B) -> torch.Tensor:
        return table[b.tokens]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x.add_(residual)

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if residual is not None:
            x = x.add_(residual)
        normed, rstd = rms_norm(self._wide(x), weight, self.config.rms_eps)
        return x, self._narrow(normed), rstd

    def encode(
        self,
        w: LayerWeights,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        b: B,
        cache: KVCache,
    ) -> torch.Tensor:
        (cos, sin), eps = b.angles, self.config.rms_eps
        keys = encode_heads(self._wide(k), w.k_norm, eps, cos, sin)
        cache.write(layer, b.write, keys.to(cache.k.dtype), v.to(cache.v.dtype))
        return self._narrow(encode_heads(self._wide(q), w.q_norm, eps, cos, sin))

    def attend(self, layer: int, q: torch.Tensor, b: B, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        mask, o = self.masks[layer], torch.zeros_like(q)
        lse = torch.zeros(q.shape[:2], dtype=mask.bias.dtype, device=q.device)
        singles = len(b.layout.singles)
        if singles:
            o[:singles] = self._attend_singles(layer, q[:singles], b, cache)
        for call, run in zip(b.layout.calls, b.calls, strict=True):
            k, v = cache.read(layer, run, mask.first_key(call.tile_end), call.tile_end)
            rows = slice(call.start, call.stop)
            o[rows], sums = self.attention.attend(q[rows], k, v, mask, call.first)
            if call.want_lse:
                lse[rows] = sums
        return o, lse

    def _attend_singles(self, layer: int, q: torch.Tensor, b: B, cache: KVCache) -> torch.Tensor:
        """o [n, heads, D] of the first rows' queries, one row of each of n sequences."""
        raise NotImplementedError

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._narrow(functional.silu(self._wide(gate)).mul_(up))

    def keep(self, layer: int, b: B, values: Mapping[str, torch.Tensor]) -> None:
        stores: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for state, start, stop, first in b.kept:
            if state.layout.training:
                for name, store in state.kept[layer].items():
                    stores.append(store[first : first + stop - start])
                    rows.append(values[name][start:stop])
        if stores:
            torch._foreach_copy_(stores, rows)

    def keep_final(self, b: B, x: torch.Tensor) -> None:
        for state, start, stop, first in b.kept:
            state.final[first : first + stop - start] = x[start:stop]

    def _shared(self, device: Device, chosen: torch.Tensor) -> Shared:
        return Shared(device, self.numerics, self.rope, self.config.vocab_size, chosen)

    def sampled(self, b: B, x: torch.Tensor) -> torch.Tensor:
        return x[b.sample_rows]

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return log_probabilities(logits)

    # ---- the head of a pass ----

    @property
    def head_rows(self) -> int:
        return 0

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logp = log_probabilities(logits)
        return logp.gather(1, targets.unsqueeze(1)).squeeze(1), logp

    def score_backward(self, kept: Any, targets: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """d logp[target] / d logits = onehot(target) - softmax."""
        logp, slope = kept, slope.unsqueeze(1)
        dlogits: torch.Tensor = logp.exp_().mul_(-slope).scatter_add_(1, targets.unsqueeze(1), slope)
        return dlogits

    # ---- backward of a unit ----

    def bind_unit(self, state: PassTensors, layer: int, first: int, end: int) -> BoundUnit:
        return BoundUnit.of_unit(UnitRows.of(state, layer, first, end), self.rope)

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

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: BoundUnit) -> torch.Tensor:
        return self._narrow(encode_heads(self._wide(q), w.q_norm, self.config.rms_eps, *unit.angles))

    def attend_backward(self, q: torch.Tensor, do: torch.Tensor, unit: BoundUnit, cache: KVCache) -> torch.Tensor:
        state, mask = unit.state, self.masks[unit.layer]
        dq = torch.empty(do.shape, dtype=mask.bias.dtype, device=do.device)
        o, lse = unit.kept("o"), unit.kept("lse")
        for span, run, (start, stop) in zip(unit.spans, unit.runs, unit.tiles, strict=True):
            tile_end = (span.index + 1) * self.numerics.tile
            first_key = mask.first_key(tile_end)
            k, v = cache.read(unit.layer, run, first_key, tile_end)
            dk, dv = state.dkv[:, :, span.base + first_key : span.stop]
            rows = slice(start, stop)
            part = (do[rows], q[rows], o[rows], lse[rows])
            dq[rows] = self.attention.attend_backward(*part, k, v, mask, dk, dv)
        return dq

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
