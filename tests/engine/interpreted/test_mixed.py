"""A forward of decode rows beside prompts and windows that was captured says and keeps what one that is computed does,
whatever was replayed before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from engine_driver import late_driver
from tables import plain_operators, use_triton
from whole import SETTINGS, served

from coserve_engine.config import LINEARS
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.triton.bound import triton_batch
from coserve_engine.kernels.triton.lora_tables import LoraTables
from coserve_engine.kernels.triton.mixed import MixedGraphs
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.messages import LoraSpec, Pass, TrainSeq
from coserve_engine.model import executor, mixed
from coserve_engine.model.executor import Executor
from coserve_engine.model.mixed import MixedForwards
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment

LENGTHS = (20, 33, 17, 24)
"""Tokens of sequences, all but the last in the cache of those that decode."""
Case = tuple[Sequence[tuple[int, int | None]], Sequence[tuple[int, int, int, int | None]], Sequence[tuple[int, int]]]
"""(sequence, adapter) of decode rows; (sequence, first, length, adapter) of prompts; (first tile, end) of windows."""
CASES: tuple[Case, ...] = (
    ([(0, 0), (1, None)], [(2, 0, 10, 1)], []),
    ([(1, 1)], [], [(0, 2)]),
    ([(2, None), (0, 0), (1, None)], [(3, 0, 5, 0), (2, 3, 6, None)], []),
    ([], [(0, 16, 4, 0)], [(1, 2)]),
    ([(3, 1)], [(1, 0, 11, None)], []),
    ([(1, None)], [(3, 0, 9, None)], []),
)


@dataclass
class Mix:
    """An executor on kernels, four sequences of which any token may be computed again, two adapters and a pass."""

    executor: Executor
    tokens: list[tuple[int, ...]]
    weights: list[Any]
    pages: list[tuple[int, ...]] = field(default_factory=list)
    passes: list[Any] = field(default_factory=list)
    cached: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        e = self.executor
        for n, tokens in enumerate(self.tokens):
            self.pages.append(e.ledger.reserve(f"request:{n}", e.numerics.pages(len(tokens))))
            e.forward((Segment(Kind.PREFILL, n, 0, len(tokens)),), {n: SequenceRows(tokens, self.pages[n])})
        for seed, dropout in enumerate((0.0, 0.3)):
            layout = e.layout(LoraSpec(4, 8.0, LINEARS, dropout))
            param = layout.fresh(seed, e.dtypes.lora, e.device)
            param += 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            work = Pass(seed, "job", 0, 0, tuple(TrainSeq(n, self.tokens[n][:5], (1.0,) * 5) for n in (0, 1)))
            pages = e.ledger.reserve(f"pass:{seed}", pages_of_pass((5, 5), e.numerics))
            self.passes.append(e.open_pass(work, e.trained(layout, param), layout, pages))
        self.cached += (e.cache.k.clone(), e.cache.v.clone())

    def run(self, case: Case, number: int, goes_on: Any = lambda layer: True) -> list[torch.Tensor] | None:
        """Hidden rows, what is written to the cache, and what the pass of that number keeps."""
        e, state = self.executor, self.passes[number % 2]
        for pool, cached in zip((e.cache.k, e.cache.v), self.cached, strict=True):
            pool.copy_(cached)
        decode, prompts, windows = case
        rows = {
            n: SequenceRows(self.tokens[n], self.pages[n], None if of is None else self.weights[of])
            for n, of in [*decode, *((n, of) for n, _, _, of in prompts if n not in dict(decode))]
        }
        segments = [Segment(Kind.DECODE, n, len(self.tokens[n]) - 1, 1, sample=True) for n, _ in decode]
        segments += [Segment(Kind.PREFILL, n, first, length) for n, first, length, _ in prompts]
        segments += [state.shape.window(first, end) for first, end in windows]
        for store in (state.final, *(store for layer in state.kept for store in layer.values())):
            store.fill_(-7.0)
        layout, batch = e.bind(tuple(segments), rows)
        done = e.run(layout, batch, goes_on)
        if done is None:
            return None
        kept = [store.clone() for layer in state.kept for store in layer.values()]
        written = [pool[:, :, e.numerics.page :].clone() for pool in (e.cache.k, e.cache.v)]
        return [done.hidden[: layout.rows].clone(), done.logits.clone(), state.final.clone(), *kept, *written]


def agree(found: Sequence[torch.Tensor] | None, expected: Sequence[torch.Tensor] | None) -> bool:
    assert found is not None
    assert expected is not None
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def mix(plain: str, random_adapter: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """For forwards of 20 rows, four of them decode, in parts of a layer."""
    use_triton(monkeypatch)
    monkeypatch.setattr(mixed, "OTHERS", (16,))
    monkeypatch.setattr(mixed, "LAYERS", 1)
    e = late_driver(plain, SETTINGS).engine.executor
    weights = [random_adapter(e, 4 + 4 * n, n).weights for n in range(2)]
    return Mix(e, [draw_tokens(n, length) for n, length in enumerate(LENGTHS)], weights)


def test_it_says_and_keeps_what_one_that_is_computed_does(mix: Mix, replays: list[int]) -> None:
    e, layers = mix.executor, mix.executor.model.layers
    expected = [mix.run(case, n) for n, case in enumerate(CASES)]
    assert e.capture() == 5
    assert replays == []
    for n in (5, 0, 1, 2, 3, 4, 1):
        assert agree(mix.run(CASES[n], n), expected[n]), n
    assert len(replays) == 7 * layers
    assert len(set(replays)) > 1  # with adapters, and without

    assert not agree(_stale(mix, "pages", *STALE["pages"]), expected[STALE["pages"][1]])
    assert not agree(_stale(mix, "entries", *STALE["entries"]), expected[STALE["entries"][1]])

    e.cache.k[:, :, : e.numerics.page] = 0.0
    before = [store.clone() for store in (e.cache.k, *mix.passes[1].kept[0].values())]
    for form in e.kernels.mixed.forms(Fixed(rows=20, pages=8, adapters=4, rank=8, others=16)):
        e._part(0, layers, None, e.kernels.mixed.fixed(form, e.copies))
    cache, *kept = (e.cache.k, *mix.passes[1].kept[0].values())
    assert not torch.equal(cache, before[0])
    assert torch.equal(cache[:, :, e.numerics.page :], before[0][:, :, e.numerics.page :])  # nobody's page alone
    assert all(torch.equal(a, b) for a, b in zip(kept, before[1:], strict=True))

    asked: list[int] = []
    assert mix.run(CASES[1], 1, lambda layer: bool(asked.append(layer))) is None
    assert asked == [1]
    assert agree(mix.run(CASES[1], 1), expected[1])


STALE = {
    **dict.fromkeys(("tokens", "positions", "write", "table", "decode_at", "calls", "pages"), (4, 0)),
    **dict.fromkeys(("entries", "blocks", "keeping"), (0, 1)),
    "order": (0, 2),
}
"""Of a graph's tensors; a batch that is replayed before, and one to which it then says something wrong."""


def _stale(mix: Mix, part: str, before: int, n: int) -> list[torch.Tensor] | None:
    """The control: what a forward gives of which one tensor holds what another batch left."""
    mix.run(CASES[before], before, lambda layer: False)
    lora = part in ("entries", "blocks", "order")
    owner: Any = LoraTables if lora else MixedGraphs
    fill = owner.fill

    def partly(self: Any, *batches: Any) -> None:
        into = self if lora else batches[0]
        at = triton_batch(into).ragged if part in ("calls", "pages") else into
        kept = getattr(at, part).clone()
        fill(self, *batches)
        getattr(at, part).copy_(kept)

    with mock.patch.object(owner, "fill", partly):
        return mix.run(CASES[n], n)


@pytest.mark.nightly
def test_each_tensor_that_is_not_put_in_anew_shows(mix: Mix, replays: list[int]) -> None:
    expected = {n: mix.run(CASES[n], n) for n in {n for _, n in STALE.values()}}
    mix.executor.capture()
    unseen = [part for part, (before, n) in STALE.items() if agree(_stale(mix, part, before, n), expected[n])]
    assert unseen == []
    assert replays


@pytest.mark.nightly
def test_replays_do_not_drift(mix: Mix, replays: list[int]) -> None:
    source = random.Random(0)
    expected = [mix.run(case, n) for n, case in enumerate(CASES)]
    mix.executor.capture()
    for _ in range(100):
        n = source.randrange(len(CASES))
        ends = source.random() < 0.2
        found = mix.run(CASES[n], n, lambda layer, ends=ends: not ends)
        assert found is None if ends else agree(found, expected[n])
    assert len(replays) > 100


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pages", [40, 16], ids=["roomy", "tight"])
def test_a_whole_engine_says_what_it_says_on_plain_operators(
    plain: str,
    random_adapter: Any,
    draw_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    replays: list[int],
    pages: int,
    seed: int,
) -> None:
    """Adapters, windows that drop inputs, and, where room is tight, requests that are put out."""
    settings = {**SETTINGS, "kv_cache_bytes": pages * 8192, "max_batch_tokens": 72}
    monkeypatch.setattr(executor, "select", plain_operators)
    d = late_driver(plain, settings, seed, jitter_s=1e-4)
    tokens, parameters = served(d, random_adapter, draw_tokens)
    use_triton(monkeypatch)
    monkeypatch.setattr(mixed, "OTHERS", (64,))
    monkeypatch.setattr(mixed, "LAYERS", 1)
    replayed: list[tuple[int, int]] = []
    replay = MixedForwards.replay

    def seen(self: MixedForwards, captured: Any, batch: Any, goes_on: Any) -> Any:
        replayed.append((len(batch.layout.singles), len(batch.layout.windows)))
        return replay(self, captured, batch, goes_on)

    monkeypatch.setattr(MixedForwards, "replay", seen)
    d = late_driver(plain, settings, seed, jitter_s=1e-4)
    assert d.engine.executor.capture() == 5
    assert replays == []
    found = served(d, random_adapter, draw_tokens)
    assert found[0] == tokens
    assert torch.allclose(found[1], parameters, atol=2e-4)
    assert any(decode for decode, _ in replayed)
    assert any(windows for _, windows in replayed) or pages == 16  # a pass finds no room beside them there
    assert d.engine.executor.copies.waits == 0
