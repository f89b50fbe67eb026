"""Words of `Kernels` that torch's operators say alike on any device; a table adds those in which devices differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import KVCache, PageRun
from coserve_engine.tensors.passes import PassTensors, UnitRows

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


@dataclass(frozen=True)
class PlainKernels(Generic[B]):
    """`masks`: one a layer, in the dtype of sums over keys; `rope`: `rope_table`."""

    config: ModelConfig
    numerics: Numerics
    attention: Attention
    masks: tuple[Mask, ...]
    rope: torch.Tensor

    # ---- forward ----

    def embed(self, table: torch.Tensor, b: B) -> torch.Tensor:
        return table[b.tokens]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x.add_(residual)

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

    def keep(self, layer: int, b: B, values: Mapping[str, torch.Tensor]) -> None:
        for state, start, stop, first in b.kept:
            if state.layout.training:
                for name, store in state.kept[layer].items():
                    store[first : first + stop - start] = values[name][start:stop]

    def keep_final(self, b: B, x: torch.Tensor) -> None:
        for state, start, stop, first in b.kept:
            state.final[first : first + stop - start] = x[start:stop]

    def sampled(self, b: B, x: torch.Tensor) -> torch.Tensor:
        return x[b.sample_rows]

    # ---- backward of a unit ----

    def bind_unit(self, state: PassTensors, layer: int, first: int, end: int) -> BoundUnit:
        return BoundUnit.of_unit(UnitRows.of(state, layer, first, end), self.rope)

    def attend_backward(self, q: torch.Tensor, do: torch.Tensor, unit: BoundUnit, cache: KVCache) -> torch.Tensor:
        state, mask = unit.state, self.masks[unit.layer]
        dq = torch.empty(do.shape, dtype=mask.bias.dtype, device=do.device)
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
