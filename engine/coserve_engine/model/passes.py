"""A pass on its way through the model: its tensors, its loss, and how far it has come.

Forward takes its tiles first to last, backward last to first, layer by layer from the head down. Rows that pad a
sequence have weight zero.
"""

from __future__ import annotations

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Device, Pending
from coserve_engine.kernels.dropout import row_keys
from coserve_engine.layout.passes import PassLayout, TileSpan, weighted_rows
from coserve_engine.messages import Pass, PassMode
from coserve_engine.model.losses import LossTerms
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import PassShape
from coserve_engine.tensors.buffers import Buffers
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.lora import LoraLayout, LoraWeights
from coserve_engine.tensors.passes import PassTensors


class PassState(PassTensors):
    """Everything a live pass owns, and how far it has come.

    It is dropped whole, and replayed from its Pass, when its pages are needed elsewhere.
    """

    def __init__(
        self,
        work: Pass,
        weights: LoraWeights,
        lora: LoraLayout,
        pages: tuple[int, ...],
        config: ModelConfig,
        numerics: Numerics,
        dtypes: Dtypes,
        device: Device,
        buffers: Buffers,
        terms: LossTerms,
        seed: int,
        kept_bytes: int | None,
        head_multiple: int,
    ) -> None:
        """`buffers` are leased to `work.id`; `terms` are of its loss; `seed` addresses dropout; `kept_bytes` bounds
        what is kept for backward (None: everything is); `head_multiple`: to which a tile's rows are padded for the
        head.
        """
        self.work, self.terms = work, terms
        self.training = work.mode is PassMode.TRAIN
        layout = PassLayout.of([seq.tokens for seq in work.seqs], pages, numerics, training=self.training)
        super().__init__(work.id, layout, weights, lora, config, dtypes, device, buffers, kept_bytes)
        self.layers = config.layers
        targets: list[int] = []
        row_weights: list[float] = []
        for seq, rows in zip(work.seqs, layout.lengths, strict=True):
            pad = rows - len(seq.tokens)
            targets += [*seq.tokens[1:], *([0] * (pad + 1))]
            row_weights += [*seq.weights[1:], *([0.0] * (pad + 1))]
        self.targets = device.stage(targets, torch.int64)
        self.row_weights = device.stage(row_weights, dtypes.accumulate)
        weighted, self.head_tiles = weighted_rows(layout.spans, row_weights, head_multiple)
        self.head_rows = device.stage(weighted, torch.int64)
        """Rows that meet the head; of each tile its `head_tiles`."""
        tiles = tuple((span.stop - span.start, (span.index + 1) * numerics.tile) for span in layout.spans)
        self.shape = PassShape(work.id, tiles, config.layers, self.training, numerics.reaches(config.windows))
        """The pass as planning sees it."""
        self.fwd_tile = 0
        """Tiles whose forward is done."""
        self.layer = config.layers
        """Where backward stands: `layers` is the head, then layers - 1 down to 0, then -1 when done."""
        self.end_tile = len(self.spans)
        """Backward of tiles [end_tile, all) of `layer` is done."""
        self.losses = torch.zeros(len(self.spans), dtype=torch.float64, device=device.device)
        """[tiles], on the device until the head is done."""
        self._outcome: Pending | None = None
        if self.training and lora.spec.dropout > 0.0:
            self.row_keys = self._hashed(seed)

    def _hashed(self, seed: int) -> torch.Tensor:
        """Dropout's address of each row: int32 [rows]."""
        keys, start = [], 0
        for seq, length in zip(self.work.seqs, self.layout.lengths, strict=True):
            positions = self.positions[start : start + length]
            keys.append(row_keys(seed, seq.uid, seq.epoch, positions, seq.turn))
            start += length
        return torch.cat(keys)

    @property
    def spans(self) -> tuple[TileSpan, ...]:
        """Its tiles, in forward order."""
        return self.layout.spans

    @property
    def forward_done(self) -> bool:
        return self.fwd_tile == len(self.spans)

    @property
    def done(self) -> bool:
        """Backward (for evaluation: the head) has reached its end."""
        return self.layer < (0 if self.training else self.layers)

    def fetch(self, device: Device) -> None:
        """Begin to fetch what came of it: the head is done, and says all."""
        finite = torch.isfinite(self.final).all().unsqueeze(0)
        self._outcome = device.fetch(torch.cat([finite, self.losses]))
        self.terms.fetch(device)

    @property
    def fetched(self) -> bool:
        """Whether what came of it is there."""
        return self._outcome is not None and self._outcome.ready() and self.terms.ready

    @property
    def finite(self) -> bool:
        """Whether all hidden rows are known to be finite."""
        return self._outcome is not None and self._outcome.ready() and bool(self._outcome.get()[0])

    def loss_sum(self) -> float:
        """Sum of weight * -log p, tile by tile in order; the head is done."""
        assert self._outcome is not None
        return sum(self._outcome.get()[1:])

    def weight_sum(self) -> float:
        return sum(weight for seq in self.work.seqs for weight in seq.weights[1:])
