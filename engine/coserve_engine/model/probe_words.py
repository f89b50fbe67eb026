"""Does a device keep a row's bits whatever its batch, by the kernels and at the widths of this model? Asked at start,
word by word: rows among many against the same rows among few, at the numbers where a kernel could change how it sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from coserve_engine.config import LINEARS
from coserve_engine.kernels.protocol import DOWN, GATE_UP, OUTPUT, QKV
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.messages import LoraSpec, SamplingParams
from coserve_engine.model.executor import Executor
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.lora import Factors, LoraLayout, LoraWeights

OWNER = "probe"
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
FEW = (5, 17)
"""Rows of small batches, beside one, a tile and one more."""
MOST_RANK, DROPOUT = 24, 0.1
CHOICES = tuple(
    SamplingParams(1, temperature=temperature, top_p=top_p, seed=seed)
    for seed, (temperature, top_p) in enumerate(((0.0, 1.0), (1.0, 1.0), (1.0, 0.9), (0.7, 1.0), (0.7, 0.5)))
)
Word = Callable[[Any, torch.Tensor], Sequence[torch.Tensor]]
"""Of a bound batch of T rows and, for each, the row of what was drawn: what a word gives, [T, ...] each."""


class Asked:
    """What was drawn for an executor's words, and which of these gave other bits."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._generator = torch.Generator(executor.device).manual_seed(0)
        self._odd: dict[str, None] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the dtype that is computed in."""
        drawn = torch.randn(*shape, generator=self._generator, device=self.executor.device)
        return drawn.to(self.executor.dtype)

    @property
    def rank(self) -> int:
        """Of the adapters that are asked about."""
        return min(MOST_RANK, self.executor.config.max_rank)

    def served(self) -> LoraWeights:
        """An adapter of every linear of the first layer."""
        model = self.executor.model
        shapes = {name: model.linear_shape(name) for name in LINEARS}
        first = {
            name: Factors(self.draw(self.rank, into), self.draw(out, self.rank), 0.1)
            for name, (out, into) in shapes.items()
        }
        return LoraWeights.served([first, *({} for _ in range(model.layers - 1))], turned=self.executor.kernels.turned)

    def trained(self) -> tuple[LoraWeights, LoraLayout]:
        """One of every linear, as a job's with dropout; neither of its factors is zero."""
        e = self.executor
        layout = e.layout(LoraSpec(self.rank, 1.0, LINEARS, DROPOUT))
        param = torch.empty(layout.size, dtype=e.dtypes.lora, device=e.device)
        return e.trained(layout, param.normal_(0, 0.1, generator=self._generator)), layout

    def same(self, name: str, found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
        """Note where they differ."""
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            self._odd[name] = None

    @property
    def odd(self) -> tuple[str, ...]:
        """Names of words that gave other bits, in the order in which they were found."""
        return tuple(self._odd)

    def positions(self, pages: int) -> int:
        """Of the longest sequence that is asked about: more than two tiles, where so many pages hold them."""
        e = self.executor
        return min(2 * e.numerics.tile + 5, e.config.max_model_length, pages * e.numerics.page)


def ask_rows(asked: Asked) -> None:
    """Of the words of a forward: a prompt's rows at once, in chunks, and as decode rows."""
    e = asked.executor
    length = asked.positions(e.ledger.free_pages)
    pages = e.ledger.reserve(OWNER, e.numerics.pages(length))
    for weights, which in ((None, ""), (asked.served(), " with an adapter")):
        rows = SequenceRows((1,) * length, pages, weights)
        _ask(asked, linears(asked, which), rows, length)
    _ask(asked, _others(asked), SequenceRows((1,) * length, pages), length)
    _ask_choices(asked, pages)
    e.ledger.free(OWNER)


def linears(asked: Asked, which: str) -> dict[str, Word]:
    """The product of each group, on rows that are drawn anew."""
    e = asked.executor
    kernels, w = e.kernels, e.transformer.weights.layers[0]
    count = 2 * asked.positions(e.ledger.total) + e.numerics.row_multiple

    def word(group: tuple[str, ...]) -> Word:
        x = asked.draw(count, e.model.linear_shape(group[0])[1])
        return lambda batch, rows: kernels.linear(w, 0, group, x[rows], batch)

    return {f"{', '.join(group)}{which}": word(group) for group in GROUPS}


def _others(asked: Asked) -> dict[str, Word]:
    """All other words but the choice of tokens."""
    e = asked.executor
    kernels, model, weights, cache = e.kernels, e.model, e.transformer.weights, e.cache
    w, count = weights.layers[0], asked.positions(e.ledger.total) + e.numerics.row_multiple
    x, residual = asked.draw(count, model.hidden), asked.draw(count, model.hidden)
    q = asked.draw(count, model.heads, model.head_size)
    k, v = (asked.draw(count, model.kv_heads, model.head_size) for _ in range(2))
    gate, up = (asked.draw(count, model.intermediate) for _ in range(2))

    def encode(batch: Any, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        encoded = kernels.encode(w, 0, q[rows], k[rows], v[rows], batch, cache)
        return encoded, *(pool[0][:, batch.write].transpose(0, 1) for pool in (cache.k, cache.v))

    def logits(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = kernels.logits(x[rows], weights.head)
        return found

    return {
        "norm": lambda batch, rows: kernels.norm(x[rows], w.input_norm, residual[rows]),
        "encode": encode,
        "attention": lambda batch, rows: kernels.attend(0, q[rows], batch, cache)[:1],
        "gate": lambda batch, rows: (kernels.gate(gate[rows], up[rows]),),
        "head": lambda batch, rows: (logits(rows),),
        "log-probabilities": lambda batch, rows: (kernels.log_probabilities(logits(rows)),),
    }


def _ask(asked: Asked, words: dict[str, Word], of: SequenceRows, length: int) -> None:
    """Each word of all rows of a sequence, and of some of them."""
    e = asked.executor
    tile, sequences = e.numerics.tile, dict.fromkeys(range(length), of)
    ones = sorted({0, min(tile // 3, length - 1), min(tile, length) - 1, length - 1})
    decodes = tuple(Segment(Kind.DECODE, at, at, 1, sample=False) for at in ones)
    counts = {min(count, length) for count in (*FEW, tile, tile + 1)}
    chunks = [(Segment(Kind.PREFILL, 0, (length - count) // 2, count),) for count in sorted(counts)]
    _, whole = e.bind((Segment(Kind.PREFILL, 0, 0, length),), sequences)
    everything = torch.arange(len(whole.layout.tokens), device=e.device)
    parts = [e.bind(segments, sequences) for segments in (*((one,) for one in decodes), decodes, *chunks)]
    for name, word in words.items():
        expected = word(whole, everything)
        for layout, batch in parts:
            rows = places(layout, e.device)
            found = word(batch, rows)
            some = rows[: layout.rows]
            asked.same(name, (one[: layout.rows] for one in found), (one[some] for one in expected))


def places(layout: BatchLayout, device: torch.device) -> torch.Tensor:
    """Of each row of a batch of one sequence, its place there."""
    return torch.tensor(layout.positions, device=device)


def _ask_choices(asked: Asked, pages: tuple[int, ...]) -> None:
    """The tokens of requests together, and of each alone."""
    e = asked.executor
    sequences = {n: SequenceRows((1, 1), pages, params=params) for n, params in enumerate(CHOICES)}
    segments = tuple(Segment(Kind.DECODE, n, 1, 1, sample=True) for n in sequences)
    logits = 4 * asked.draw(len(segments), e.model.vocab_size).to(e.dtypes.accumulate)

    def chosen(some: Sequence[int]) -> torch.Tensor:
        layout, batch = e.bind(tuple(segments[n] for n in some), sequences)
        rows = [*some, *([some[-1]] * (len(layout.sample_rows) - len(some)))]
        tokens: torch.Tensor = e.kernels.sample(logits[rows], batch, e.counts)
        return tokens[: len(some)]

    together = chosen(tuple(sequences))
    for n in sequences:
        asked.same("choice of tokens", (chosen((n,)),), (together[n : n + 1],))
