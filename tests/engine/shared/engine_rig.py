"""An executor driven segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from random_models import Adapter

from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.messages import (
    Pass,
)
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment, Unit


@dataclass
class Rig:
    """An executor and the sequences in its cache."""

    executor: Executor
    sequences: dict[int, SequenceRows] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], adapter: Adapter | None = None) -> int:
        """Reserve pages for a sequence; returns its slot."""
        slot = len(self.sequences) + 1
        pages = self.executor.ledger.reserve(f"request:{slot}", self.executor.numerics.pages(len(tokens)))
        self.sequences[slot] = SequenceRows(tuple(tokens), pages, adapter.weights if adapter else None)
        return slot

    def clear(self) -> None:
        for slot in self.sequences:
            self.executor.ledger.free(f"request:{slot}")
        self.sequences.clear()

    def forward(self, *segments: Segment) -> dict[int, torch.Tensor]:
        forwarded = self.executor.forward(segments, self.sequences)
        return dict(zip(forwarded.slots, forwarded.logits, strict=True))

    def rows(
        self, slot: int, sizes: Iterable[int], start: int = 0, beside: Callable[[], Sequence[Segment]] = tuple
    ) -> dict[int, torch.Tensor]:
        """Chunks of these sizes one after another, size 1 as decode: logits at the last position of each."""
        seen = {}
        for size in sizes:
            kind = Kind.DECODE if size == 1 else Kind.PREFILL
            logits = self.forward(Segment(kind, slot, start, size, sample=True), *beside())
            start += size
            seen[start - 1] = logits[slot]
        return seen

    def open(self, work: Pass, adapter: Adapter, **how: Any) -> PassState:
        lengths = tuple(len(seq.tokens) for seq in work.seqs)
        pages = self.executor.ledger.reserve(f"pass:{work.id}", pages_of_pass(lengths, self.executor.numerics))
        return self.executor.open_pass(work, adapter.weights, adapter.layout, pages, **how)

    def window(self, state: PassState, tiles: int) -> Segment:
        """The next `tiles` tiles of a pass in forward, fewer at its end."""
        last = min(state.fwd_tile + tiles, len(state.spans)) - 1
        start = state.spans[state.fwd_tile].start
        return Segment(Kind.FINETUNE, state.work.id, start, state.spans[last].stop - start)

    def unit(self, state: PassState, tiles: int) -> Unit:
        """The next unit of a pass in backward, of at most `tiles` tiles."""
        return Unit(state.work.id, state.layer, max(0, state.end_tile - tiles), state.end_tile)

    def run_pass(
        self,
        work: Pass,
        adapter: Adapter,
        window: Callable[[], int] = lambda: 1,
        unit: Callable[[], int] = lambda: 1,
        between: Callable[[], object] = lambda: None,
        **how: Any,
    ) -> PassState:
        """A pass from open to close, its windows and units of drawn numbers of tiles; `between` runs after each."""
        state = self.open(work, adapter, **how)
        while not state.forward_done:
            self.forward(self.window(state, window()))
            between()
        while not state.done:
            self.executor.backward(self.unit(state, unit()))
            between()
        if state.training:
            state.grads = state.grads.clone()  # its buffers are the next pass's
        self.executor.close_pass(work.id)
        return state
