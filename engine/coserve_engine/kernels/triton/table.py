"""The table of kernels in Triton: products with frozen weights are the library's, all else is ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from triton.runtime import driver

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.kernels.attention import Attention, reference_backward, reference_forward
from coserve_engine.kernels.bound import BoundBatch, BoundUnit
from coserve_engine.kernels.plain import layer_windows
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.kernels.sampling import choose
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.kernels.triton import attention, attention_backward, encode, lora, loss, norm
from coserve_engine.kernels.triton.attention_parts import Heads
from coserve_engine.kernels.triton.bound import Tables, TritonUnit, triton_batch
from coserve_engine.kernels.triton.gate import backward as gate_backward
from coserve_engine.kernels.triton.gate import forward as silu_gate
from coserve_engine.kernels.triton.graphs import AdaptedGraphs
from coserve_engine.kernels.triton.keep import keep
from coserve_engine.kernels.triton.launch import compiled
from coserve_engine.kernels.triton.lora_backward import lora_gradient
from coserve_engine.kernels.triton.lora_tables import LoraTables
from coserve_engine.kernels.triton.mixed import MixedGraphs
from coserve_engine.kernels.triton.sampling import draw
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import HEAD_ROWS, Numerics
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors
from coserve_engine.tensors.weights import LayerWeights

HOPPER = 90
"""The compute capability, times ten, from which warp groups multiply."""


def is_hopper(device: torch.device) -> bool:
    """Or newer; the interpreter takes everybody's."""
    if device.type != "cuda":
        return True
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= HOPPER)


@dataclass(frozen=True)
class TritonKernels(TorchKernels):
    """`Kernels` in bfloat16 and float32, on one device, of a model that is not `unfit`.

    Args:
        heads: one a layer.
    """

    heads: tuple[Heads, ...] = ()
    tables: Tables = field(default_factory=lambda: Tables(0))

    @classmethod
    def create(cls, config: ModelConfig, numerics: Numerics, dtypes: Dtypes, rope: torch.Tensor) -> Self:
        windows, hopper = layer_windows(config, rope.shape[1]), is_hopper(rope.device)
        sizes = (config.heads, config.kv_heads, config.head_size, numerics.tile, numerics.page)
        heads = {window: Heads(*sizes, window, hopper) for window in set(windows)}
        nobodys = Attention(numerics, reference_forward, reference_backward, "none of it")
        of_layers = tuple(heads[window] for window in windows)
        return cls(config, numerics, nobodys, (), rope, dtypes, windows, heads=of_layers, tables=Tables(config.layers))

    def notes(self) -> Iterator[str]:
        yield f"kernels: triton, {self.dtypes.compute} on {self.rope.device}".replace("torch.", "")
        yield f"{compiled()} kinds of launches are compiled"
        yield from self._promise()

    def _promise(self) -> Iterator[str]:
        yield "rows may depend on their batch: the library's products promise no bits"

    @property
    def graphs(self) -> AdaptedGraphs | None:
        return AdaptedGraphs(self.bind, self.numerics, self.tables.of_adapters)

    @property
    def mixed(self) -> MixedGraphs | None:
        return MixedGraphs(self.bind, self.numerics, self.tables.of_adapters)

    # ---- forward ----

    def bind(
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        device: Device,
        chosen: torch.Tensor,
    ) -> BoundBatch:
        return self.tables.bind(layout, sequences, passes, self._shared(device, chosen))

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return norm.forward(x, weight, self.config.rms_eps, residual)

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: BoundBatch
    ) -> tuple[torch.Tensor, ...]:
        return self._group(w, layer, group, x, triton_batch(b).lora)

    def _group(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, tables: LoraTables | None
    ) -> tuple[torch.Tensor, ...]:
        """Outputs of a group's linears, columns of one tensor."""
        outs = self._outs(group)
        product = w.fused.get(group, w.linears[group[0]]).forward
        if tables is None or not tables.adapts(group):
            return torch.split(product(x), [*outs], -1)
        low = tables.beside(partial(lora.shrink, x, tables, layer, group))
        y = product(x)
        lora.expand(low(), y, tables, layer, group, outs)
        return torch.split(y, [*outs], -1)

    def _outs(self, group: tuple[str, ...]) -> tuple[int, ...]:
        return tuple([self.config.linear_shape(name)[0] for name in group])

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
        how = (w.q_norm, w.k_norm, self.config.rms_eps, b.rope, b.positions, b.write)
        return encode.forward(q, k, v, *how, cache.k[layer], cache.v[layer])

    def attend(self, layer: int, q: torch.Tensor, b: BoundBatch, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode rows by one way, the rest by another, unless all are alike; padding attends to nothing."""
        batch, of, k, v = triton_batch(b), self.heads[layer], cache.k[layer], cache.v[layer]
        o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        if b.layout.rows < q.shape[0]:
            o[b.layout.rows :].zero_()
        if b.layout.singles and not self.tables.alike:
            attention.decode(q, k, v, batch.decode_at, b.table, o, of)
        if batch.ragged.calls.shape[0]:
            attention.forward(q, k, v, batch.ragged, o, lse, of)
        return o, lse

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return silu_gate(gate, up)

    def keep(self, layer: int, b: BoundBatch, values: Mapping[str, torch.Tensor]) -> None:
        windows = triton_batch(b).keeping
        if windows.shape[0]:
            keep(layer, values, windows)

    def sample(self, logits: torch.Tensor, b: BoundBatch, counts: TokenCounts) -> torch.Tensor:
        return choose(logits, b.choices, counts, draw)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return loss.log_softmax(logits)

    # ---- the head of a pass ----

    @property
    def head_rows(self) -> int:
        return HEAD_ROWS

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logp, lse, _ = loss.score(logits, targets)
        return logp, (logits, lse)

    def score_backward(self, kept: Any, targets: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        logits, lse = kept
        out = logits if self.dtypes.compute is logits.dtype else torch.empty_like(logits, dtype=self.dtypes.compute)
        return loss.backward(logits, targets, lse, slope, out)

    # ---- backward of a unit ----

    def bind_unit(self, state: PassTensors, layer: int, first: int, end: int) -> BoundUnit:
        return self.tables.unit(state, layer, first, end, self.rope)

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return norm.backward(dy, x, rstd, weight, residual)

    def linear_again(
        self, w: LayerWeights, group: tuple[str, ...], x: torch.Tensor, unit: BoundUnit
    ) -> tuple[torch.Tensor, ...]:
        adapted = _unit(unit).adapted
        if len(group) == 1 or group in w.fused:
            return self._group(w, unit.layer, group, x, adapted)
        return tuple([self._group(w, unit.layer, (name,), x, adapted)[0] for name in group])

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
        dy, at, state = _side_by_side(dys), _unit(unit), unit.state
        dx = w.fused.get(group, w.linears[group[0]]).backward(dy) if need_dx else None
        if at.tables.lora is not None:
            grads, tiles = state.grad_views[unit.layer], (at.at.first, at.at.end)
            into = (dx, state.grads, grads, at.tables.lora)
            lora_gradient(dy, x, *into, unit.layer, group, self._outs(group), tiles, unit.rows)
        return dx

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: BoundUnit) -> torch.Tensor:
        return encode.queries(q, w.q_norm, self.config.rms_eps, unit.rope, unit.positions)

    def attend_backward(self, q: torch.Tensor, do: torch.Tensor, unit: BoundUnit, cache: KVCache) -> torch.Tensor:
        at, layer = _unit(unit), unit.layer
        kept = (unit.stored["o"], unit.stored["lse"], unit.state.dkv)
        pools = (cache.k[layer], cache.v[layer])
        return attention_backward.backward(q, do, *kept, *pools, at.tables.attention, at.at, self.heads[layer])

    def encode_backward(
        self, w: LayerWeights, dq: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None, unit: BoundUnit
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        how = (w.q_norm, w.k_norm, self.config.rms_eps, unit.rope, unit.positions)
        return encode.backward(dq, unit.state.dkv[:, :, unit.rows], q, k, *how)

    def gate_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward computes silu(gate) once more."""
        return silu_gate(gate, up), gate

    def gate_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, saved: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return gate_backward(dh, gate, up)


def _unit(unit: BoundUnit) -> TritonUnit:
    assert isinstance(unit, TritonUnit)  # this table's own
    return unit


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[R, sum of widths]: the tensor whose columns they are, or a copy of them."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    at = first.storage_offset()
    for part in parts:
        if part._base is not first._base or part.storage_offset() != at or part.stride() != (width, 1):
            return torch.cat(list(parts), -1)
        at += part.shape[1]
    return first.as_strided((first.shape[0], width), (width, 1))
