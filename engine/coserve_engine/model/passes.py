"""A pass on its way through the model: its rows, what is kept for backward, and how far it has come.

Rows of all its sequences lie one after another, each sequence padded to the row multiple with rows of weight zero.
Tiles are absolute in their sequence; forward takes them first to last, backward last to first, layer by layer from
the head down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.cpu.dropout import row_keys
from coserve_engine.kernels.cpu.lora import RowDropout
from coserve_engine.messages import Pass, PassMode
from coserve_engine.model.losses import LossTerms
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import PassShape
from coserve_engine.tensors.buffers import Buffers
from coserve_engine.tensors.kept import plan_kept
from coserve_engine.tensors.kv_cache import PageRun
from coserve_engine.tensors.lora import LoraLayout, LoraWeights


@dataclass(frozen=True, slots=True)
class TileSpan:
    """Rows [start, stop) of a pass: tile `index` of sequence `seq`; `base` is the sequence's first row."""

    seq: int
    index: int
    base: int
    start: int
    stop: int


def tile_spans(lengths: tuple[int, ...], numerics: Numerics) -> tuple[TileSpan, ...]:
    """The tiles of sequences of these lengths (tokens), in forward order."""
    spans, base = [], 0
    for seq, length in enumerate(lengths):
        padded = numerics.pad(length)
        for index in range(numerics.tiles(padded)):
            start = index * numerics.tile
            spans.append(TileSpan(seq, index, base, base + start, base + min(start + numerics.tile, padded)))
        base += padded
    return tuple(spans)


def pages_of_pass(lengths: tuple[int, ...], numerics: Numerics) -> int:
    """Pages that a pass must reserve."""
    return sum(numerics.pages(numerics.pad(length)) for length in lengths)


class PassState:
    """Everything a live pass owns.

    It is dropped whole, and replayed from its Pass, when its pages are needed elsewhere.
    """

    def __init__(
        self,
        work: Pass,
        weights: LoraWeights,
        layout: LoraLayout,
        pages: tuple[int, ...],
        config: ModelConfig,
        numerics: Numerics,
        buffers: Buffers,
        terms: LossTerms,
        seed: int,
        kept_bytes: int | None,
    ) -> None:
        """`buffers` are leased to `work.id`; `terms` are of its loss; `seed` addresses dropout; `kept_bytes` bounds
        what is kept for backward (None: everything is).
        """
        dtype, device = buffers.dtype, buffers.device
        self.work, self.weights, self.layout, self.terms = work, weights, layout, terms
        lengths = tuple(len(seq.tokens) for seq in work.seqs)
        self.lengths = tuple(map(numerics.pad, lengths))
        """Rows of each sequence, padding included."""
        self.spans = tile_spans(lengths, numerics)
        self.rows = self.spans[-1].stop
        self.layers = config.layers
        tokens: list[int] = []
        targets: list[int] = []
        row_weights: list[float] = []
        positions: list[int] = []
        write: list[int] = []
        self.page_tables: list[tuple[int, ...]] = []
        taken = 0
        for seq in work.seqs:
            length = len(seq.tokens)
            pad = numerics.pad(length) - length
            tokens += [*seq.tokens, *([0] * pad)]
            targets += [*seq.tokens[1:], *([0] * (pad + 1))]
            row_weights += [*seq.weights[1:], *([0.0] * (pad + 1))]
            positions += range(length + pad)
            table = pages[taken : taken + numerics.pages(length + pad)]
            taken += len(table)
            self.page_tables.append(table)
            write += [table[p // numerics.page] * numerics.page + p % numerics.page for p in range(length + pad)]
        self.places = torch.tensor([tokens, positions, write], dtype=torch.int64, device=device)
        """[3, rows]: token, position in the sequence, and index into the cache."""
        self.positions = self.places[1]
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)
        self.row_weights = torch.tensor(row_weights, dtype=dtype, device=device)
        ends = {span: (span.index + 1) * numerics.tile for span in self.spans}
        self.runs = {s: PageRun.covering(self.page_tables[s.seq], end, numerics, device) for s, end in ends.items()}
        """Pages up to each tile's end."""
        self.training = work.mode is PassMode.TRAIN
        tiles = tuple((span.stop - span.start, end) for span, end in ends.items())
        self.shape = PassShape(work.id, tiles, config.layers, self.training, numerics.reaches(config.windows))
        """The pass as planning sees it."""
        self.fwd_tile = 0
        """Tiles whose forward is done."""
        self.layer = config.layers
        """Where backward stands: `layers` is the head, then layers - 1 down to 0, then -1 when done."""
        self.end_tile = len(self.spans)
        """Backward of tiles [end_tile, all) of `layer` is done."""
        self.losses = [0.0] * len(self.spans)

        plan = plan_kept(config, self.rows * dtype.itemsize, kept_bytes) if self.training else ()
        shapes: list[tuple[int, ...]] = [(self.rows, config.hidden)]
        if self.training:
            shapes += [(self.rows, config.hidden), (2, config.kv_heads, self.rows, config.head_size), (layout.size,)]
        shapes += [(self.rows, *shape) for layer in plan for shape in layer.values()]
        self.final, *leased = buffers.lease(work.id, shapes)
        if self.training:
            self.dx, self.dkv, self.grads, *leased = leased
            self.grad_views = layout.views(self.grads.zero_())
        rest = iter(leased)
        self.kept = tuple({name: next(rest) for name in layer} for layer in plan)
        drops = self.training and layout.spec.dropout > 0.0
        self._row_keys = self._hashed(seed) if drops else None

    def _hashed(self, seed: int) -> torch.Tensor:
        """Dropout's address of each row: int32 [rows]."""
        keys, start = [], 0
        for seq, length in zip(self.work.seqs, self.lengths, strict=True):
            positions = self.positions[start : start + length]
            keys.append(row_keys(seed, seq.uid, seq.epoch, positions, seq.turn))
            start += length
        return torch.cat(keys)

    def drop(self, rows: slice) -> RowDropout | None:
        """What dropout does to these rows in training; None where it does nothing."""
        return None if self._row_keys is None else RowDropout(self._row_keys[rows], self.layout.spec.dropout)

    @property
    def forward_done(self) -> bool:
        return self.fwd_tile == len(self.spans)

    @property
    def done(self) -> bool:
        """Backward (for evaluation: the head) has reached its end."""
        return self.layer < (0 if self.training else self.layers)

    def loss_sum(self) -> float:
        """Sum of weight * -log p, tile by tile in order."""
        return sum(self.losses)

    def weight_sum(self) -> float:
        return sum(weight for seq in self.work.seqs for weight in seq.weights[1:])
