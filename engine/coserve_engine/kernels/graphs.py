"""Batches of decode rows whose tensors stay where they are, so that a captured forward finds each next one there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from coserve_engine.device.protocol import Device
from coserve_engine.kernels.bound import BoundBatch
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.layout.batch import BatchLayout, lay_out
from coserve_engine.layout.choices import Choice
from coserve_engine.messages import SamplingParams
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.passes import PassTensors

B = TypeVar("B", bound=BoundBatch)
SEQUENCES = 8
"""Of prompts and windows in a captured forward, were each as long as can be: room for their pages."""


@dataclass(frozen=True, slots=True)
class Nobody:
    """A sequence of one token, in the page that is nobody's."""

    tokens: tuple[int, ...] = (0,)
    pages: tuple[int, ...] = (NULL_PAGE,)
    adapter: None = None
    weights: None = None
    scored: None = None

    def choice(self) -> Choice:
        return Choice(SamplingParams(1), 1)


@dataclass(frozen=True, slots=True)
class PagedGraphs(Generic[B]):
    """`Graphs` of batches, as `bind` binds them, that find the pages of decode rows in one table."""

    bind: Callable[[BatchLayout, Mapping[int, Nobody], Mapping[int, PassTensors], Device, torch.Tensor], B]
    numerics: Numerics

    def adapters(self, rows: int) -> tuple[int, ...]:
        """None: their rows are in the batch's layout."""
        return (0,)

    def takes(self, layout: BatchLayout) -> bool:
        rest = layout.calls or layout.windows or layout.scored
        return not rest and len(layout.singles) == len(layout.sample_slots) > 0

    def fixed(self, size: Fixed, device: Device) -> B:
        """Its first rows are those of decode; any others are padding."""
        rows, pages = size.rows - size.others, size.pages
        segments = tuple(Segment(Kind.DECODE, slot, 0, 1, sample=True) for slot in range(rows))
        nobody = dict.fromkeys(range(rows), Nobody())
        nothing = torch.zeros(0, dtype=torch.int64, device=device.device)
        bound = self.bind(lay_out(segments, nobody, {}, self.numerics, size.rows), nobody, {}, device, nothing)
        table = torch.full((rows, pages), NULL_PAGE, dtype=torch.int64, device=device.device)
        return replace(bound, table=table)

    def fill(self, into: B, b: B) -> None:
        """Pages of the batch before must not be seen: they may hold what is not finite."""
        into.tokens.copy_(b.tokens)
        into.positions.copy_(b.positions)
        into.write.copy_(b.write)
        into.table.fill_(NULL_PAGE)
        into.table[: b.table.shape[0], : b.table.shape[1]].copy_(b.table)
