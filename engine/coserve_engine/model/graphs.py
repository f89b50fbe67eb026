"""Forwards of decode rows that were captured, for a few numbers of rows: the host enqueues all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from coserve_engine.device.protocol import Device, Graph
from coserve_engine.kernels.protocol import Fixed, Graphs
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment

Compute = Callable[[Any], torch.Tensor]
"""Hidden rows [T, H] of a bound batch."""
PARTS = 4
"""Graphs for each doubling of the rows."""


def buckets(most: int, numerics: Numerics) -> tuple[int, ...]:
    """Numbers of rows for which there is a graph; the last holds `most`."""
    sizes, step = [numerics.row_multiple], numerics.row_multiple
    while sizes[-1] < most:
        if sizes[-1] == 2 * PARTS * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return tuple(sizes)


class Captured(NamedTuple):
    """A graph, the batch that it reads, and where its rows are until it is replayed again."""

    graph: Graph
    batch: Any
    hidden: torch.Tensor


class DecodeGraphs:
    """Of batches that are no larger than `most`."""

    def __init__(self, graphs: Graphs[Any], compute: Compute, device: Device, numerics: Numerics, most: Fixed) -> None:
        self._graphs, self._compute, self._device, self._most = graphs, compute, device, most
        self._sizes = buckets(most.rows, numerics)
        self._captured: dict[int, list[tuple[int, Captured]]] = {}
        """By rows: for how many adapters at most."""

    def capture(self) -> int:
        """All of them, the largest first: the others find room in its memory. Returns how many."""
        for rows in reversed(self._sizes):
            counts = {min(count, self._most.adapters) for count in self._graphs.adapters(rows)}
            self._captured[rows] = sorted((count, self._of(rows, count)) for count in sorted(counts, reverse=True))
        return sum(map(len, self._captured.values()))

    def _of(self, rows: int, adapters: int) -> Captured:
        size = self._most._replace(rows=rows, adapters=adapters)
        self._compute(self._graphs.fixed(size, self._device))  # what is loaded at first use cannot be captured
        batch = self._graphs.fixed(size, self._device)  # another: that one has computed what its layers share
        made: list[torch.Tensor] = []
        graph = self._device.capture(lambda: made.append(self._compute(batch)))
        return Captured(graph, batch, *made)

    def rows(self, segments: Sequence[Segment]) -> int:
        """How many rows a batch of these must have for a graph; 0 where there is none."""
        if any(segment.kind is not Kind.DECODE for segment in segments):
            return 0
        return next((rows for rows in self._sizes if rows >= len(segments)), 0)

    def find(self, layout: BatchLayout, batch: Any) -> Captured | None:
        """The least graph that has room for a batch, where there is one."""
        if not self._graphs.takes(layout):
            return None
        of_rows = self._captured.get(len(layout.tokens), ())
        return next((captured for count, captured in of_rows if count >= len(layout.adapters)), None)

    def replay(self, captured: Captured, batch: Any, goes_on: Callable[[int], bool]) -> torch.Tensor | None:
        """Hidden rows [T, H] of a batch by the graph that was found for it, which nothing ends."""
        self._graphs.fill(captured.batch, batch)
        captured.graph.replay()
        return captured.hidden
