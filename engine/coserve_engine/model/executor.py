"""The narrow waist between decisions and tensors: a forward of a batch, one unit of backward, nothing
about requests or jobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coserve_engine.config import EngineConfig, ModelConfig
from coserve_engine.device.protocol import Device
from coserve_engine.device.select import device_of
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_folder import check_length, read_model_config
from coserve_engine.kernels.functional import repeat_last_row
from coserve_engine.kernels.masks import keep_allowed
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.sampling import BoundChoices
from coserve_engine.kernels.select import select
from coserve_engine.latency.work import mean_reaches
from coserve_engine.layout.batch import BatchLayout, lay_out
from coserve_engine.layout.masks import TokenMasks
from coserve_engine.messages import LoraSpec, LossName, Pass
from coserve_engine.model import head, outcome
from coserve_engine.model.graphs import DecodeGraphs
from coserve_engine.model.loading import Read, load_weights
from coserve_engine.model.losses import LOSSES, LossTerms
from coserve_engine.model.mixed import MixedForwards, mixed_sizes
from coserve_engine.model.outcome import Sampled
from coserve_engine.model.passes import PassState
from coserve_engine.model.rope import rope_table
from coserve_engine.model.sequences import Computable
from coserve_engine.model.transformer import Between, Transformer
from coserve_engine.scheduler.pages import PageLedger
from coserve_engine.scheduler.plan import Segment, Unit
from coserve_engine.tensors.buffers import Buffers, keep_freed_memory
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.lora import LoraLayout, LoraWeights


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a forward left.

    Args:
        layout: of its batch, which is bound as `batch`.
        logits: [N, vocab], last rows of the layout's `sample_slots`.
        hidden: [T, H], all rows before the last norm: those of requests first, in the plan's order.
    """

    layout: BatchLayout
    batch: Any
    logits: torch.Tensor
    hidden: torch.Tensor

    @property
    def slots(self) -> tuple[int, ...]:
        """The requests that sample."""
        return self.layout.sample_slots


class Executor:
    """Model, cache and live passes of one engine on one device."""

    def __init__(self, config: EngineConfig, copies: Device | None = None, read: Read | None = None) -> None:
        """`copies` and `read` stand for the device's own, and for `read_tensors`, where there is neither."""
        torch.set_num_threads(config.threads)
        keep_freed_memory()
        folder = Path(config.model_path)
        self.config, self.numerics = config, config.numerics
        self.model: ModelConfig = read_model_config(folder)
        if config.end_tokens is not None:
            self.model = replace(self.model, eos_token_ids=config.end_tokens)
        check_length(folder, self.model, config.max_model_length)
        self.reaches = mean_reaches(self.numerics.reaches(self.model.windows))
        self.dtypes, self.device = Dtypes.of(config.dtype), torch.device(config.device)
        self.copies: Device = copies or device_of(self.device)
        """Between host and device."""
        positions = self.numerics.pad(config.max_model_length)
        rope = rope_table(self.model.rope, self.model.head_size, positions, self.dtypes.accumulate, self.device)
        how = {"backward": config.finetuning, "exact": config.exact, "fallback": config.kernel_fallback}
        self.kernels = select(self.model, self.numerics, self.dtypes, rope, **how)
        weights = load_weights(folder, self.model, self.dtype, self.device, self.kernels, read)
        self.transformer = Transformer(self.model, weights, self.kernels)
        pages = config.kv_cache_bytes // KVCache.page_bytes(self.model, self.numerics, self.dtypes.cache)
        if pages <= self.numerics.pages(positions):
            raise ModelFolderError(
                f"kvCacheMemory of {config.kv_cache_bytes} bytes holds {pages} pages of {self.numerics.page} tokens, "
                f"less than one sequence of maxModelLength {config.max_model_length}; raise kvCacheMemory"
            )
        self.cache = KVCache(self.model, pages, self.numerics, self.dtypes.cache, self.device)
        self.ledger = PageLedger(pages, self._scrub)
        self.buffers = Buffers(self.device)
        self.counts = TokenCounts(self.model.vocab_size, self.copies)
        self._chosen = torch.zeros(0, dtype=torch.int64, device=self.device)
        """[N], what the rows of the last forward that sampled chose."""
        self.graphs: tuple[DecodeGraphs | MixedForwards, ...] = ()
        """Forwards that were captured."""
        self.passes: dict[int, PassState] = {}
        self.pass_ids = itertools.count(1)

    @property
    def dtype(self) -> torch.dtype:
        """What weights and hidden rows are."""
        return self.dtypes.compute

    def layout(self, spec: LoraSpec) -> LoraLayout:
        return LoraLayout(self.model, spec)

    def trained(self, layout: LoraLayout, param: torch.Tensor) -> LoraWeights:
        """To compute with parameters [layout.size] that a job changes."""
        return LoraWeights.trained(layout, param, self.dtypes.compute, turned=self.kernels.turned)

    def open_pass(
        self,
        work: Pass,
        weights: LoraWeights,
        lora: LoraLayout,
        pages: tuple[int, ...],
        seed: int = 0,
        loss: LossName = LossName.CROSS_ENTROPY,
        *,
        want_logprobs: bool = False,
    ) -> PassState:
        """Make a pass live; its pages were reserved as `pass:<id>`, `seed` is its job's."""
        terms = LossTerms(
            LOSSES[loss], work, self.numerics, self.dtypes.accumulate, self.copies, want_logprobs=want_logprobs
        )
        state = PassState(
            work,
            weights,
            lora,
            pages,
            self.model,
            self.numerics,
            self.dtypes,
            self.copies,
            self.buffers,
            terms,
            seed,
            self.config.pass_bytes,
            1 if self.kernels.head_rows else self.numerics.row_multiple,
        )
        self.passes[work.id] = state
        return state

    def close_pass(self, pass_id: int) -> None:
        """Forget a live pass; its pages and buffers are the next one's."""
        state = self.passes.pop(pass_id)
        if not state.finite:
            self._scrub(tuple(page for table in state.layout.tables for page in table))
        self.ledger.free(f"pass:{pass_id}")
        self.buffers.release(pass_id)

    def capture(self, clock: Callable[[], float] | None = None) -> int:
        """Capture forwards where kernels can be: with others beside decode rows first, which are larger. Returns how
        many; with a clock only those sizes of others that are worth it.
        """
        config, kernels = self.config, self.kernels
        pages = self.numerics.pages(self.numerics.pad(config.max_model_length))
        most = Fixed(config.places, pages, config.places, config.max_rank)
        made: list[DecodeGraphs | MixedForwards] = []
        if kernels.mixed is not None:
            sizes = mixed_sizes(config.places, config.max_batch_tokens, self.numerics)
            mixed = MixedForwards(kernels.mixed, self._part, self.model.layers, self.copies, sizes, most)
            if clock is not None:
                mixed.trim(clock)
            made.append(mixed)
        if kernels.graphs is not None:
            made.append(DecodeGraphs(kernels.graphs, self._decode, self.copies, self.numerics, most))
        captured = sum([graphs.capture() for graphs in made])
        self.graphs = tuple(made)
        return captured

    def _part(self, first: int, end: int, between: Between | None, batch: Any) -> Between:
        """Of a batch."""
        return self.transformer.part(first, end, between, batch, self.cache)

    def _decode(self, batch: Any) -> torch.Tensor:
        """Hidden rows [T, H] of a batch of decode rows."""
        hidden = self.transformer.forward(batch, self.cache, lambda layer: True)
        assert hidden is not None  # nobody ends it
        return hidden

    def _scrub(self, pages: tuple[int, ...]) -> None:
        self.cache.scrub(self.copies.stage(pages, torch.int64))

    def forward(
        self,
        segments: tuple[Segment, ...],
        sequences: Mapping[int, Computable],
        goes_on: Callable[[int], bool] = lambda layer: True,
    ) -> Forwarded | None:
        """Bind a batch and run it."""
        return self.run(*self.bind(segments, sequences), goes_on)

    def bind(self, segments: tuple[Segment, ...], sequences: Mapping[int, Computable]) -> tuple[BatchLayout, Any]:
        """The layout of a batch, and the batch as the kernels have bound it."""
        passes = {pass_id: state.layout for pass_id, state in self.passes.items()}
        least = max([graphs.rows(segments) for graphs in self.graphs], default=0)
        layout = lay_out(segments, sequences, passes, self.numerics, least)
        return layout, self.kernels.bind(layout, sequences, self.passes, self.copies, self._chosen)

    def run(self, layout: BatchLayout, batch: Any, goes_on: Callable[[int], bool]) -> Forwarded | None:
        """Run a bound batch. None where `goes_on` (`Transformer.forward`) ended it: nothing has happened then."""
        hidden = self._rows(layout, batch, goes_on)
        if hidden is None:
            return None
        for pass_id, start, stop, first in layout.windows:
            state = self.passes[pass_id]
            state.fwd_tile = sum(span.stop <= first + stop - start for span in state.spans)
        count = len(layout.sample_slots)
        if count == 0:
            return Forwarded(layout, batch, hidden[:0], hidden)
        return Forwarded(layout, batch, self._logits(self.kernels.sampled(batch, hidden))[:count], hidden)

    def _rows(self, layout: BatchLayout, batch: Any, goes_on: Callable[[int], bool]) -> torch.Tensor | None:
        """Hidden rows [T, H] of a bound batch, by a graph where there is one."""
        for graphs in self.graphs:
            captured: Any = graphs.find(layout, batch)
            if captured is not None:
                hidden = graphs.replay(captured, batch, goes_on)
                if hidden is not None:
                    self.kernels.keep_final(batch, hidden)
                return hidden
        return self.transformer.forward(batch, self.cache, goes_on)

    def sample(self, forwarded: Forwarded, masks: TokenMasks | None = None) -> Sampled:
        """Choose the tokens of a forward, and begin to fetch all that requests get of it. With masks its logits are
        changed, once all that is said of the model's own was computed.
        """
        layout, batch, logits = forwarded.layout, forwarded.batch, forwarded.logits
        parts: list[torch.Tensor] = []
        if layout.sample_slots:
            choices, finite = batch.choices, outcome.finite(logits).double()
            logp = self._reported(choices, logits)
            if masks is not None:
                keep_allowed(logits, masks, self.copies)
            self._chosen = self.kernels.sample(logits, batch, self.counts)
            parts += [self._chosen.double(), finite]
            if logp is not None:
                reported = self._chosen[choices.ints("reported")[: choices.layout.reports]]
                parts.append(outcome.report(logp, reported, tops=choices.layout.tops))
        for (_, start, targets, top), wanted in zip(layout.scored, batch.targets, strict=True):
            parts += self._scores(forwarded.hidden[start : start + len(targets)], wanted, tops=top > 0)
        return Sampled(layout, self.copies.fetch(torch.cat(parts)) if parts else None)

    def _reported(self, choices: BoundChoices, logits: torch.Tensor) -> torch.Tensor | None:
        """Log-probabilities [n, vocab] of the rows of which some are wanted."""
        count = choices.layout.reports
        return self.log_probabilities(logits[choices.ints("reported")])[:count] if count else None

    def _scores(self, hidden: torch.Tensor, targets: torch.Tensor, *, tops: bool) -> Iterator[torch.Tensor]:
        """`outcome.report` of the `targets` [n] that follow hidden rows [n, H]."""
        for part, wanted in zip(
            torch.split(hidden, outcome.SCORED_ROWS), torch.split(targets, outcome.SCORED_ROWS), strict=True
        ):
            logits = self._logits(repeat_last_row(part, self.numerics.row_multiple))
            yield outcome.report(self.log_probabilities(logits)[: part.shape[0]], wanted, tops=tops)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of rows of logits [N, vocab], in their place; N is a multiple of the row multiple."""
        return self.kernels.log_probabilities(logits)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.transformer.weights
        return head.logits(hidden, weights.norm, weights.head, self.kernels)

    def backward(self, unit: Unit) -> None:
        """Run one unit and advance its pass."""
        state = self.passes[unit.pass_id]
        if (unit.layer, unit.end) != (state.layer, state.end_tile):
            raise ValueError(f"{unit} does not go on from layer {state.layer}, tile {state.end_tile}")
        weights = self.transformer.weights
        if unit.layer == self.model.layers:
            head.head_unit(state, unit.first, unit.end, weights.norm, weights.head, self.kernels)
        else:
            self.transformer.backward(state, unit.layer, unit.first, unit.end, self.cache)
        state.end_tile = unit.first
        if unit.first == 0:
            state.layer, state.end_tile = unit.layer - 1, len(state.spans)
            if unit.layer == self.model.layers:
                state.fetch(self.copies)
