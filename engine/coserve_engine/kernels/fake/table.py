"""A table that computes nothing: what an iteration costs beside the device, and how many launches it asks for.

A word is one launch, as a table of fused kernels has it; a group of linears is one product and, where rows have an
adapter, two more for all adapters together. Values are zeros: of a view that holds one, but for what is written to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.kernels import bound
from coserve_engine.kernels.bound import BoundBatch, Shared
from coserve_engine.kernels.protocol import Adapted, Graphs, Mixed
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.adam import AdamState, AdamW
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.passes import PassTensors, UnitRows
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights


class FakeLinear:
    """Shapes of a frozen weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._out, self._into = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _zeros(x, x.shape[0], self._out)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        return _zeros(dy, dy.shape[0], self._into)


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)


@dataclass(frozen=True)
class FakeKernels:
    """`Kernels` that count their launches by word."""

    config: ModelConfig
    numerics: Numerics
    dtypes: Dtypes
    rope: torch.Tensor
    launches: Counter[str] = field(default_factory=Counter)
    exact: bool = False
    turned: bool = False
    graphs: Graphs[BoundBatch] | None = None
    mixed: Mixed[BoundBatch] | None = None
    fused: tuple[tuple[str, ...], ...] = ()

    def notes(self) -> Iterator[str]:
        yield "kernels: fake, nothing is computed"

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        return FakeLinear(weight)

    # ---- forward ----

    def bind(
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        device: Device,
        chosen: torch.Tensor,
    ) -> BoundBatch:
        shared = Shared(device, self.numerics, self.rope, self.config.vocab_size, chosen)
        return bound.bind(layout, sequences, passes, shared, paged=True)

    def embed(self, table: torch.Tensor, b: BoundBatch) -> torch.Tensor:
        self.launches["embed"] += 1
        return _zeros(table, len(b.layout.tokens), table.shape[1])

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.launches["norm"] += 1
        return x, x, x[:, :1]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        self.launches["add"] += 1
        return x

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: BoundBatch
    ) -> tuple[torch.Tensor, ...]:
        self.launches["linear"] += 1
        self.launches["adapters"] += 2 * bool(b.adapters)
        return tuple(w.linears[name].forward(x) for name in group)

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
        self.launches["encode"] += 1
        return q

    def attend(self, layer: int, q: torch.Tensor, b: BoundBatch, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        self.launches["attend"] += bool(b.layout.singles) + bool(b.layout.calls)
        return q, q[..., 0].to(self.dtypes.accumulate)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.launches["gate"] += 1
        return gate

    def keep(self, layer: int, b: BoundBatch, values: Mapping[str, torch.Tensor]) -> None:
        self.launches["keep"] += bool(b.layout.windows)

    def keep_final(self, b: BoundBatch, x: torch.Tensor) -> None:
        self.launches["keep"] += bool(b.layout.windows)

    def sampled(self, b: BoundBatch, x: torch.Tensor) -> torch.Tensor:
        self.launches["sampled"] += 1
        return x[: len(b.layout.sample_rows)]

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        self.launches["logits"] += 1
        return torch.zeros(x.shape[0], self.config.vocab_size, dtype=self.dtypes.accumulate, device=x.device)

    def sample(self, logits: torch.Tensor, b: BoundBatch, counts: TokenCounts) -> torch.Tensor:
        self.launches["sample"] += 1
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        self.launches["log_probabilities"] += 1
        return logits

    # ---- backward of a unit ----

    def bind_unit(self, state: PassTensors, layer: int, first: int, end: int) -> UnitRows:
        return UnitRows.of(state, layer, first, end)

    @property
    def head_rows(self) -> int:
        return 0

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.launches["score"] += 1
        return torch.zeros(targets.shape, dtype=logits.dtype, device=logits.device), logits

    def score_backward(self, kept: Any, targets: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        self.launches["score_backward"] += 1
        dlogits: torch.Tensor = kept
        return dlogits

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        self.launches["logits_backward"] += 1
        return head.backward(dlogits).to(self.dtypes.compute)

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.launches["norm_backward"] += 1
        return dy

    def linear_again(
        self, w: LayerWeights, group: tuple[str, ...], x: torch.Tensor, unit: UnitRows
    ) -> tuple[torch.Tensor, ...]:
        self.launches["linear"] += 1
        self.launches["adapters"] += 2
        return tuple(w.linears[name].forward(x) for name in group)

    def linear_backward(
        self,
        w: LayerWeights,
        group: tuple[str, ...],
        dys: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        unit: UnitRows,
        *,
        need_dx: bool = True,
    ) -> torch.Tensor | None:
        """One product for dx; of the adapter A's and B's inputs again, both gradients, and its part of dx."""
        self.launches["linear_backward"] += need_dx
        self.launches["adapters"] += 4 + need_dx
        return w.linears[group[0]].backward(dys[0]) if need_dx else None

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: UnitRows) -> torch.Tensor:
        self.launches["encode"] += 1
        return q

    def attend_backward(self, q: torch.Tensor, do: torch.Tensor, unit: UnitRows, cache: KVCache) -> torch.Tensor:
        """One launch for queries, one for keys and values."""
        self.launches["attend_backward"] += 2
        return q

    def encode_backward(
        self, w: LayerWeights, dq: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None, unit: UnitRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.launches["encode_backward"] += 1
        keys = _zeros(dq, dq.shape[0], self.config.kv_heads, self.config.head_size)
        return dq, keys, keys

    def gate_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.launches["gate"] += 1
        return gate, gate

    def gate_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, saved: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.launches["gate_backward"] += 1
        return dh, dh

    # ---- optimizer ----

    def optimize(self, param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> torch.Tensor:
        """Norm and clipping, then the update."""
        self.launches["optimize"] += 2
        return torch.ones(2, device=self.rope.device)
