"""A batch's layout as tensors, bound once for all layers. Pages side by side are read in place, and so are the rows of
one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch

from coserve_engine.device.protocol import Columns, Device, Staged
from coserve_engine.kernels.dropout import dropout
from coserve_engine.kernels.lora import AdapterRows, LoraGroup, ScatteredRows
from coserve_engine.kernels.protocol import Adapted
from coserve_engine.kernels.sampling import BoundChoices
from coserve_engine.layout.batch import BatchLayout, TileCall
from coserve_engine.layout.choices import ChoiceLayout
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.tensors.kv_cache import PageRun, Reader
from coserve_engine.tensors.lora import AB, LoraWeights, Pair
from coserve_engine.tensors.passes import PassTensors, UnitRows


class KeptRows(NamedTuple):
    """Rows [start, stop) of the batch are rows [first, ...) of a pass."""

    state: PassTensors
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class Shared:
    """What all batches of an engine are bound with.

    Args:
        rope: `rope_table`, of the longest sequence.
        vocab: tokens that there are.
        chosen: [N] int64, what the last forward's rows chose.
    """

    device: Device
    numerics: Numerics
    rope: torch.Tensor
    vocab: int
    chosen: torch.Tensor


@dataclass(frozen=True)
class BoundRows:
    """`layout` as the tensors that every table computes its T rows with.

    Args:
        tokens, positions, write: [T].
        sample_rows: [padded number of rows to sample].
        targets: [n], of each of the layout's `scored`.
        rope: `rope_table`.
    """

    layout: BatchLayout
    tokens: torch.Tensor
    positions: torch.Tensor
    write: torch.Tensor
    kept: tuple[KeptRows, ...]
    sample_rows: torch.Tensor
    choices: BoundChoices
    targets: tuple[torch.Tensor, ...]
    rope: torch.Tensor

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, D]."""
        cos, sin = self.rope[:, self.positions].unsqueeze(2)
        return cos, sin


@dataclass(frozen=True)
class BoundBatch(BoundRows):
    """With what plain operators read of it.

    Args:
        table: [n, most pages] of the n decode rows, null pages where a sequence has fewer; or else `singles`, the pages
        of each. `calls`: of the layout's.
        readers, hidden: by a mask's reach, how the decode rows' keys and values are read, or which of the table's they
        do not see; made when first asked for.
    """

    table: torch.Tensor
    singles: tuple[PageRun, ...]
    calls: tuple[PageRun, ...]
    adapters: AdapterRows
    readers: dict[int | None, tuple[Reader, ...]] = field(default_factory=dict)
    hidden: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BoundUnit(UnitRows):
    """A unit's rows with what its words share."""

    rope: torch.Tensor

    @classmethod
    def of_unit(cls, unit: UnitRows, rope: torch.Tensor) -> BoundUnit:
        return cls(unit.state, unit.layer, unit.spans, unit.runs, rope)

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
        cos, sin = self.rope[:, self.positions].unsqueeze(2)
        return cos, sin

    @property
    def positions(self) -> torch.Tensor:
        """[R], in the sequence."""
        return self.state.positions[self.rows]


def bind(
    layout: BatchLayout,
    sequences: Mapping[int, Adapted],
    passes: Mapping[int, PassTensors],
    shared: Shared,
    *,
    paged: bool,
) -> BoundBatch:
    """`paged`: whether the pages of decode rows are to be one table; `sequences` and `passes` are the layout's."""
    columns = Columns()
    rows = put_rows(layout, passes, shared, columns)
    table = put_table(layout.singles if paged else (), columns)
    singles = PageRun.put([] if paged else [call.pages for call in layout.singles], columns)
    calls = PageRun.put([call.pages for call in layout.calls], columns)
    adapted: list[tuple[LoraWeights, list[int]]] = []
    for slot, members in layout.adapters:
        weights = sequences[slot].weights
        assert weights is not None  # or the layout would not name it
        adapted.append((weights, members))
    adapters = _put_adapters(adapted, shared.numerics, columns)
    staged = shared.device.stage_columns(columns)
    tuned: list[LoraGroup] = []
    for pass_id, start, stop, first in layout.windows:
        state, window = passes[pass_id], slice(first, first + stop - start)
        tuned.append(LoraGroup(state.weights, slice(start, stop), state.drop(window)))
    return BoundBatch(
        **vars(rows(staged)),
        table=table(staged),
        singles=singles(staged),
        calls=calls(staged),
        adapters=(*(rows(staged) for rows in adapters), *tuned),
    )


def put_rows(
    layout: BatchLayout, passes: Mapping[int, PassTensors], shared: Shared, columns: Columns
) -> Callable[[Staged], BoundRows]:
    """Put the rows of a batch among what will be staged; to be called with that."""
    count, rows, total = layout.request_rows, layout.rows, len(layout.tokens)
    pieces = [(0, total)] if not layout.windows else [(0, count), (rows, total)]
    placed = [_put_places(layout, start, stop, columns) for start, stop in pieces]
    sampled, targets = columns.ints(layout.sample_rows), [columns.ints(some.targets) for some in layout.scored]
    choices = BoundChoices.put(ChoiceLayout.of(layout.choices, shared.vocab, shared.numerics.row_multiple), columns)

    def bound(staged: Staged) -> BoundRows:
        parts = [staged.ints[at].view(3, -1) for at in placed]
        kept: list[KeptRows] = []
        for n, (pass_id, start, stop, first) in enumerate(layout.windows):
            state = passes[pass_id]
            parts.insert(1 + n, state.places[:, first : first + stop - start])
            kept.append(KeptRows(state, start, stop, first))
        places = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return BoundRows(
            layout,
            tokens=_known(places[0], layout, shared.chosen),
            positions=places[1],
            write=places[2],
            kept=tuple(kept),
            sample_rows=staged.ints[sampled],
            choices=choices(staged),
            targets=tuple([staged.ints[at] for at in targets]),
            rope=shared.rope,
        )

    return bound


def put_table(calls: Sequence[TileCall], columns: Columns) -> Callable[[Staged], torch.Tensor]:
    """Pages [n, most pages] of n calls, null pages where one has fewer: put among what will be staged."""
    most = max([len(call.pages) for call in calls], default=0)
    flat: list[int] = []
    for call in calls:
        flat += call.pages
        flat += [NULL_PAGE] * (most - len(call.pages))
    at = columns.ints(flat)
    return lambda staged: staged.ints[at].view(len(calls), most)


def _put_places(layout: BatchLayout, start: int, stop: int, columns: Columns) -> slice:
    """[3, rows]: those of `PassTensors.places`."""
    first = columns.ints(layout.tokens[start:stop]).start
    columns.ints(layout.positions[start:stop])
    return slice(first, columns.ints(layout.write[start:stop]).stop)


def _known(tokens: torch.Tensor, layout: BatchLayout, chosen: torch.Tensor) -> torch.Tensor:
    """Tokens [T], with those of the last forward's `chosen` where the host does not know them."""
    if min(layout.tokens, default=0) >= 0:
        return tokens
    return torch.where(tokens < 0, chosen[(-1 - tokens).clamp_(min=0)], tokens)


def _put_adapters(
    parts: Iterable[tuple[LoraWeights, list[int]]], numerics: Numerics, columns: Columns
) -> list[Callable[[Staged], LoraGroup | ScatteredRows]]:
    """Rows of requests by adapter: in place where they are neighbours and need no padding, else gathered."""
    made: list[Callable[[Staged], LoraGroup | ScatteredRows]] = []
    scattered: list[tuple[LoraWeights, list[int]]] = []
    for weights, rows in parts:
        if rows[-1] - rows[0] == len(rows) - 1 and numerics.pad(len(rows)) == len(rows):
            group = LoraGroup(weights, slice(rows[0], rows[-1] + 1))
            made.append(lambda staged, group=group: group)  # type: ignore[misc]
        else:
            scattered.append((weights, rows))
    return [*made, ScatteredRows.put(scattered, numerics.row_multiple, columns)] if scattered else made
