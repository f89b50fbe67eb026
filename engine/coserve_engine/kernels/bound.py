"""A batch's layout as tensors, bound once for all layers. Pages side by side are read in place, and so are the rows of
one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch

from coserve_engine.kernels.dropout import dropout
from coserve_engine.kernels.lora import AdapterRows, LoraGroup, ScatteredRows
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.kv_cache import PageRun, Reader
from coserve_engine.tensors.lora import AB, LoraWeights, Pair
from coserve_engine.tensors.passes import PassTensors, UnitRows


class KeptRows(NamedTuple):
    """Rows [start, stop) of the batch are rows [first, ...) of a pass."""

    state: PassTensors
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class BoundBatch:
    """`layout` as the tensors that its T rows are computed with.

    Args:
        tokens, positions, write: [T].
        singles, calls: the pages of each of the layout's.
        sample_rows: [padded number of rows to sample].
        rope: `rope_table`.
        readers: by a mask's reach, of the decode rows' keys and values; made when first asked for.
    """

    layout: BatchLayout
    tokens: torch.Tensor
    positions: torch.Tensor
    write: torch.Tensor
    singles: tuple[PageRun, ...]
    calls: tuple[PageRun, ...]
    adapters: AdapterRows
    kept: tuple[KeptRows, ...]
    sample_rows: torch.Tensor
    rope: torch.Tensor
    readers: dict[int | None, tuple[Reader, ...]] = field(default_factory=dict)

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, D]."""
        cos, sin = self.rope[:, self.positions].unsqueeze(2)
        return cos, sin


@dataclass(frozen=True)
class BoundUnit(UnitRows):
    """A unit's rows with what its words share."""

    rope: torch.Tensor

    @classmethod
    def of_unit(cls, unit: UnitRows, rope: torch.Tensor) -> BoundUnit:
        return cls(unit.state, unit.layer, unit.spans, unit.pages, rope)

    @property
    def adapters(self) -> AdapterRows:
        """The adapter of these rows, for what is computed again."""
        rows = slice(0, self.rows.stop - self.rows.start)
        return (LoraGroup(self.state.weights, rows, self.state.drop(self.rows)),)

    def trained(self, name: str) -> tuple[Pair | None, AB | None, Callable[[torch.Tensor], torch.Tensor] | None]:
        """What the adapter adds in a linear, the buffers of its gradients, and the dropout of its inputs; None where it
        has none here.
        """
        state, layer, mask = self.state, self.layer, self.state.drop(self.rows)
        drop = None if mask is None else partial(dropout, rows=mask.keys, layer=layer, linear=name, p=mask.p)
        return state.weights.layers[layer].get(name), state.grad_views[layer].get(name), drop

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [R, 1, D]."""
        cos, sin = self.rope[:, self.state.positions[self.rows]].unsqueeze(2)
        return cos, sin


def bind(
    layout: BatchLayout,
    sequences: Mapping[int, Adapted],
    passes: Mapping[int, PassTensors],
    numerics: Numerics,
    rope: torch.Tensor,
) -> BoundBatch:
    """`sequences` and `passes`: those that the layout names."""
    device = rope.device
    count, rows = layout.request_rows, layout.rows
    parts = [_places(layout, 0, count, device)]
    tuned: list[LoraGroup] = []
    kept: list[KeptRows] = []
    for pass_id, start, stop, first in layout.windows:
        state, members = passes[pass_id], slice(first, first + stop - start)
        parts.append(state.places[:, members])
        tuned.append(LoraGroup(state.weights, slice(start, stop), state.drop(members)))
        kept.append(KeptRows(state, start, stop, first))
    if len(layout.tokens) > rows:
        parts.append(_places(layout, rows, len(layout.tokens), device))
    places = torch.cat(parts, 1)
    adapted: list[tuple[LoraWeights, list[int]]] = []
    for slot, members_of in layout.adapters:
        weights = sequences[slot].weights
        assert weights is not None  # or the layout would not name it
        adapted.append((weights, members_of))
    return BoundBatch(
        layout,
        tokens=places[0],
        positions=places[1],
        write=places[2],
        singles=tuple(PageRun.of(call.pages, device) for call in layout.singles),
        calls=tuple(PageRun.of(call.pages, device) for call in layout.calls),
        adapters=(*_adapters(adapted, numerics, device), *tuned),
        kept=tuple(kept),
        sample_rows=torch.tensor(layout.sample_rows, dtype=torch.int64, device=device),
        rope=rope,
    )


def _places(layout: BatchLayout, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """[3, rows]: those of `PassTensors.places`."""
    columns = [layout.tokens[start:stop], layout.positions[start:stop], layout.write[start:stop]]
    return torch.tensor(columns, dtype=torch.int64, device=device)


def _adapters(parts: Iterable[tuple[LoraWeights, list[int]]], numerics: Numerics, device: torch.device) -> AdapterRows:
    """Rows of requests by adapter: in place where they are neighbours and need no padding, else gathered."""
    in_place: list[LoraGroup] = []
    scattered: list[tuple[LoraWeights, list[int]]] = []
    for weights, rows in parts:
        if rows[-1] - rows[0] == len(rows) - 1 and numerics.pad(len(rows)) == len(rows):
            in_place.append(LoraGroup(weights, slice(rows[0], rows[-1] + 1)))
        else:
            scattered.append((weights, rows))
    return (*in_place, ScatteredRows.of(scattered, numerics.row_multiple, device)) if scattered else tuple(in_place)
