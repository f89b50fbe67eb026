"""The tensors of a pass: what forward keeps of it, and what backward turns them into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Columns, Device
from coserve_engine.layout.passes import PassLayout, TileSpan
from coserve_engine.tensors.buffers import Buffers, Shape
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kept import plan_kept
from coserve_engine.tensors.kv_cache import PageRun
from coserve_engine.tensors.lora import LoraLayout, LoraWeights


@dataclass(frozen=True, slots=True)
class RowDropout:
    """Rows with these `keys` [R] (`dropout.row_keys`) drop inputs of A with probability `p`."""

    keys: torch.Tensor
    p: float


class PassTensors:
    """Of one pass with rows of `layout`, whose adapter is `weights` in the layout `lora`.

    Tensors that it trains with are there where the layout is of a training pass.
    """

    def __init__(
        self,
        owner: int,
        layout: PassLayout,
        weights: LoraWeights,
        lora: LoraLayout,
        config: ModelConfig,
        dtypes: Dtypes,
        device: Device,
        buffers: Buffers,
        kept_bytes: int | None,
    ) -> None:
        """`buffers` are leased to `owner`; `kept_bytes` bounds what is kept for backward (None: everything is)."""
        self.layout, self.weights, self.lora = layout, weights, lora
        rows, training = layout.rows, layout.training
        columns = [layout.tokens, layout.positions, layout.write]
        self.places = device.stage(columns, torch.int64)
        """[3, rows]: token, position in the sequence, and place in the pool."""
        pages = Columns()
        runs = PageRun.put(layout.pages if training else (), pages)
        self.runs = runs(device.stage_columns(pages))
        """Of each tile's `layout.pages`, for backward."""
        self.row_keys: torch.Tensor | None = None
        """[rows], where training drops inputs."""
        compute, wide = dtypes.compute, dtypes.accumulate
        wider = rows * config.heads * config.layers * (wide.itemsize - compute.itemsize)
        limit = None if kept_bytes is None else kept_bytes - wider
        plan = plan_kept(config, rows * compute.itemsize, limit) if training else ()
        shapes: list[Shape] = [((rows, config.hidden), compute)]
        if training:
            dkv = (2, config.kv_heads, rows, config.head_size)
            shapes += [((rows, config.hidden), compute), (dkv, wide), ((lora.size,), dtypes.lora)]
        for layer in plan:
            shapes += [((rows, *shape), wide if name == "lse" else compute) for name, shape in layer.items()]
        self.final, *leased = buffers.lease(owner, shapes)
        """[rows, hidden], after the last layer."""
        if training:
            self.dx, self.dkv, self.grads, *leased = leased
            self.grad_views = lora.views(self.grads.zero_())
        rest = iter(leased)
        self.kept = tuple({name: next(rest) for name in layer} for layer in plan)

    @property
    def positions(self) -> torch.Tensor:
        """[rows], in the sequence."""
        return self.places[1]

    def drop(self, rows: slice) -> RowDropout | None:
        """What dropout does to these rows in training; None where it does nothing."""
        return None if self.row_keys is None else RowDropout(self.row_keys[rows], self.lora.spec.dropout)


@dataclass(frozen=True)
class UnitRows:
    """The rows of a pass that one unit of backward takes through one layer."""

    state: PassTensors
    layer: int
    spans: tuple[TileSpan, ...]
    """Last tile first: the order of every sum over positions."""
    runs: tuple[PageRun, ...]
    """Pages up to each tile's end."""

    @classmethod
    def of(cls, state: PassTensors, layer: int, first: int, end: int) -> UnitRows:
        """Tiles [first, end)."""
        spans, runs = state.layout.spans[first:end], state.runs[first:end]
        return cls(state, layer, spans[::-1], runs[::-1])

    @property
    def start(self) -> int:
        return self.spans[-1].start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.spans[0].stop)

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Row ranges of the tiles, counted from the unit's first row."""
        return tuple((span.start - self.start, span.stop - self.start) for span in self.spans)

    @property
    def stored(self) -> Mapping[str, torch.Tensor]:
        """What forward kept of this layer."""
        return self.state.kept[self.layer]

    def kept(self, name: str) -> torch.Tensor:
        """What forward kept of these rows."""
        return self.stored[name][self.rows]
