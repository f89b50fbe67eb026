"""Forwards of decode rows beside prompts and windows that were captured, for a few sizes, in parts: between two of them
a forward may be ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch

from coserve_engine.device.protocol import Device, Graph
from coserve_engine.device.timing import seconds_of
from coserve_engine.kernels.protocol import Fixed, Mixed
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.model.graphs import buckets
from coserve_engine.model.transformer import Between
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment

Part = Callable[[int, int, Between | None, Any], Between]
"""`Transformer.part` of a bound batch."""
DECODE_PARTS, OTHERS = (4, 2, 1), (64, 128, 256, 512)
"""Decode rows of a size are the most by one of these; rows of others."""
LAYERS = 8
"""Of a part."""
HARDLY, TIMES = 1.1, 3
"""So many times as long as the least size is hardly longer; how often each is measured, the first time in vain."""


class Size(NamedTuple):
    """Rows of decode at most, and `rows` in all."""

    decode: int
    rows: int


def mixed_sizes(places: int, batch_tokens: int, numerics: Numerics) -> tuple[Size, ...]:
    """For which there are graphs: of at most so many decode rows, and rows in all; by rows."""
    decode = {next(rows for rows in buckets(places, numerics) if parts * rows >= places) for parts in DECODE_PARTS}
    made = [Size(rows, rows + others) for rows in decode for others in OTHERS if rows + others <= batch_tokens]
    return tuple(sorted(made, key=lambda size: (size.rows, size.decode)))


class CapturedParts(NamedTuple):
    """Graphs of a forward, the batch that they read, and where its rows are until they are replayed again."""

    graphs: tuple[Graph, ...]
    batch: Any
    hidden: torch.Tensor


class MixedForwards:
    """Of batches of these sizes; `most` has the rest of what they have room for."""

    def __init__(
        self, graphs: Mixed[Any], part: Part, layers: int, device: Device, sizes: tuple[Size, ...], most: Fixed
    ) -> None:
        self._graphs, self._part, self._device, self._most, self._sizes = graphs, part, device, most, sizes
        firsts = range(0, layers, LAYERS)
        self._parts = tuple((first, min(first + LAYERS, layers)) for first in firsts)
        self._captured: dict[int, list[CapturedParts]] = {}
        """By rows; those for the fewest decode rows first."""

    def trim(self, clock: Callable[[], float]) -> None:
        """Leave out sizes that take longer than the least where each kernel is launched: a host that launches takes as
        long for few rows, so that of the others padding costs nothing, and of these more than the host.
        """
        least_s, kept = inf, []
        for size in self._sizes:
            seconds = self._launched_s(size, clock)
            if seconds > HARDLY * least_s:
                break
            least_s = min(least_s, seconds)
            kept.append(size)
        self._sizes = tuple(kept)

    def _launched_s(self, size: Size, clock: Callable[[], float]) -> float:
        batch = self._graphs.fixed(self._forms(size)[0], self._device)
        times = [seconds_of(self._device, clock, partial(self._run, batch)) for _ in range(TIMES)]
        return min(times[1:])

    def _forms(self, size: Size) -> tuple[Fixed, ...]:
        return self._graphs.forms(self._most._replace(rows=size.rows, others=size.rows - size.decode))

    def _run(self, batch: Any) -> None:
        between = None
        for first, end in self._parts:
            between = self._part(first, end, between, batch)

    def capture(self) -> int:
        """All of them, the largest first: the others find room in its memory. Returns how many."""
        for size in reversed(self._sizes):
            found = [self._of(form) for form in self._forms(size)]
            self._captured[size.rows] = found + self._captured.get(size.rows, [])
        return sum(map(len, self._captured.values()))

    def _of(self, size: Fixed) -> CapturedParts:
        self._run(self._graphs.fixed(size, self._device))  # what is loaded at first use cannot be captured
        batch = self._graphs.fixed(size, self._device)  # another: that one has computed what its layers share
        made: list[Between | None] = [None]

        def run(first: int, end: int) -> None:
            made.append(self._part(first, end, made[-1], batch))

        graphs = [self._device.capture(partial(run, first, end)) for first, end in self._parts]
        last = made[-1]
        assert last is not None  # there is a layer
        return CapturedParts(tuple(graphs), batch, last[0])

    def rows(self, segments: Sequence[Segment]) -> int:
        """How many rows a batch of these must have for a graph; 0 where there is none."""
        decode = sum(segment.kind is Kind.DECODE for segment in segments)
        count = sum(segment.length for segment in segments)
        if decode == len(segments):
            return 0
        return next((size.rows for size in self._sizes if size.decode >= decode and size.rows >= count), 0)

    def find(self, layout: BatchLayout, batch: Any) -> CapturedParts | None:
        """The graphs that have room for a batch, where there are."""
        if len(layout.singles) == layout.rows:
            return None
        captured = self._captured.get(len(layout.tokens), ())
        return next((each for each in captured if self._graphs.holds(each.batch, batch)), None)

    def replay(self, captured: CapturedParts, batch: Any, goes_on: Callable[[int], bool]) -> torch.Tensor | None:
        """Hidden rows [T, H] of a batch by the graphs that were found for it; None where `goes_on` ended it, which is
        asked before each part but the first.
        """
        self._graphs.fill(captured.batch, batch)
        for (first, _), graph in zip(self._parts, captured.graphs, strict=True):
            if first > 0 and not goes_on(first):
                return None
            graph.replay()
        return captured.hidden
