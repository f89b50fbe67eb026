"""A row's logits depend on its sequence alone, bit for bit in float32: not on chunks, the batch, or finetuning."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.messages import AddRequest, IterationDone, Pass, SamplingParams, TokenBatch, TrainSeq
from coserve_engine.scheduler.plan import Kind, Segment

LENGTH = 150
EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def chunkings(draw: st.DrawFn) -> list[int]:
    """Chunk sizes that sum to LENGTH."""
    sizes: list[int] = []
    while (left := LENGTH - sum(sizes)) > 0:
        sizes.append(draw(st.integers(1, min(left, 100))))
    return sizes


class Finetuning:
    """Windows of passes beside requests and backward units between forwards, of drawn sizes, pass after pass."""

    def __init__(self, rig: Any, adapter: Any, source: random.Random, draw_tokens: Any) -> None:
        self._rig, self._adapter, self._source, self._draw = rig, adapter, source, draw_tokens
        self._state: Any = None
        self.units = 0

    def window(self) -> Sequence[Segment]:
        if self._state is None:
            lengths = [self._source.randint(5, 140) for _ in range(2)]
            seqs = tuple(
                TrainSeq(i, self._draw(self._source.randrange(1000), n), (0.01,) * n) for i, n in enumerate(lengths)
            )
            self._state = self._rig.open(Pass(7, "job", 0, 0, seqs), self._adapter)
        if not self._state.forward_done:
            return [self._rig.window(self._state, self._source.randint(1, 3))]
        for _ in range(self._source.randint(1, 4)):
            self._rig.executor.backward(self._rig.unit(self._state, self._source.randint(1, 4)))
            self.units += 1
            if self._state.done:
                self.close()
                break
        return []

    def close(self) -> None:
        if self._state is not None:
            self._rig.executor.close_pass(7)
            self._state = None


def differing(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> int:
    assert found
    return sum(not torch.equal(row, expected[at]) for at, row in found.items())


@pytest.fixture(scope="module")
def one_by_one(rig: Any, draw_tokens: Any) -> dict[int, torch.Tensor]:
    """Logits at every position when every token is decoded alone."""
    r = rig()
    return r.rows(r.add(draw_tokens(5, LENGTH)), [1] * LENGTH)


@pytest.fixture(scope="module")
def shared(rig: Any) -> Any:
    return rig()


@EXAMPLES
@given(sizes=chunkings())
def test_chunks_of_prefill(shared: Any, draw_tokens: Any, one_by_one: Any, sizes: list[int]) -> None:
    shared.clear()
    assert differing(shared.rows(shared.add(draw_tokens(5, LENGTH)), sizes), one_by_one) == 0


@EXAMPLES
@given(sizes=chunkings(), seed=st.integers(0, 1 << 16))
def test_finetuning_beside(
    shared: Any, draw_tokens: Any, random_adapter: Any, one_by_one: Any, sizes: list[int], seed: int
) -> None:
    shared.clear()
    tuning = Finetuning(shared, random_adapter(shared.executor), random.Random(seed), draw_tokens)
    found = shared.rows(shared.add(draw_tokens(5, LENGTH)), sizes, beside=tuning.window)
    tuning.close()
    assert differing(found, one_by_one) == 0


@EXAMPLES
@given(sizes=chunkings(), seed=st.integers(0, 1 << 16))
def test_other_sequences_in_the_batch(
    shared: Any, draw_tokens: Any, random_adapter: Any, one_by_one: Any, sizes: list[int], seed: int
) -> None:
    shared.clear()
    source = random.Random(seed)
    adapter = random_adapter(shared.executor, rank=6)
    slot = shared.add(draw_tokens(5, LENGTH))
    others = [shared.add(draw_tokens(n, LENGTH), source.choice((None, adapter))) for n in range(5)]
    done = dict.fromkeys(others, 0)

    def beside() -> list[Segment]:
        segments = []
        for other in source.sample(others, source.randint(0, 5)):
            length = min(source.choice((1, 1, 5, 40)), LENGTH - done[other])
            if length:
                segments.append(Segment(Kind.PREFILL, other, done[other], length, sample=source.random() < 0.5))
                done[other] += length
        return segments

    assert differing(shared.rows(slot, sizes, beside=beside), one_by_one) == 0


FEWER = settings(EXAMPLES, max_examples=8)
OTHERS = ("llama31", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, rig: Any, model_path: Any, draw_tokens: Any) -> Any:
    """A rig of another architecture, and its logits when every token is decoded alone."""
    path = model_path(request.param)
    r = rig(path)
    return rig(path), r.rows(r.add(draw_tokens(5, LENGTH)), [1] * LENGTH)


@FEWER
@given(sizes=chunkings(), seed=st.integers(0, 1 << 16))
def test_other_architectures(other: Any, draw_tokens: Any, random_adapter: Any, sizes: list[int], seed: int) -> None:
    """Chunks of prefill, with finetuning beside them."""
    r, expected = other
    r.clear()
    tuning = Finetuning(r, random_adapter(r.executor), random.Random(seed), draw_tokens)
    found = r.rows(r.add(draw_tokens(5, LENGTH)), sizes, beside=tuning.window)
    tuning.close()
    assert differing(found, expected) == 0


def test_key_ranges_that_begin_with_the_rows_break_it(
    rig: Any, save_model: Any, tmp_path: Path, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thin version of a window: keys from the first that any row of the call sees."""
    save_model(tmp_path, model_type="mistral", sliding_window=200)
    r, tokens = rig(str(tmp_path)), draw_tokens(5, 300)
    one_by_one, fives = [240] + [1] * 60, [240] + [5] * 12
    right = r.rows(r.add(tokens), one_by_one)
    assert differing(r.rows(r.add(tokens), fives), right) == 0
    attend = Attention.attend

    def attend_cut(
        self: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = (mask.part(first, q.shape[0] * mask.group, k.shape[1])[0, 0] == 0).any(0)
        start = int(seen.nonzero()[0])
        return attend(self, q, k[:, start:], v[:, start:], mask, first)

    monkeypatch.setattr(Attention, "attend", attend_cut)
    monkeypatch.setattr(Attention, "attend_singles", one_by_one_singles(attend_cut))
    alone = r.rows(r.add(tokens), one_by_one)
    assert max(float((row - right[at]).abs().max()) for at, row in alone.items()) < 1e-4, "it computes attention"
    assert differing(r.rows(r.add(tokens), fives), alone) > 0


def one_by_one_singles(attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """`Attention.attend_singles` that attends row by row."""

    def singles(self: Attention, q: torch.Tensor, keys: Any, mask: Mask, firsts: tuple[int, ...]) -> torch.Tensor:
        parts = zip(q.split(1), keys, firsts, strict=True)
        return torch.cat([attend(self, row, k[0], v[0], mask, first)[0] for row, (k, v), first in parts])

    return singles


def attend_raw(
    self: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The thin version: just the rows there are, over just the keys they see."""
    count, heads, size = q.shape
    tile = self.numerics.tile
    length = k.shape[1] - tile + first + count
    keys, values = (x[:, :length].repeat_interleave(heads // k.shape[0], 0) for x in (k, v))
    scores = torch.bmm(q.transpose(0, 1), keys.transpose(1, 2)) / math.sqrt(size)
    causal = torch.full((count, count), float("-inf")).triu(1)
    scores[..., length - count :] += causal
    out = torch.bmm(torch.softmax(scores, -1), values).transpose(0, 1)
    return out, torch.logsumexp(scores, -1).transpose(0, 1)


def test_raw_kv_lengths_break_it(rig: Any, draw_tokens: Any, one_by_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig()
    monkeypatch.setattr(Attention, "attend", attend_raw)
    monkeypatch.setattr(Attention, "attend_singles", one_by_one_singles(attend_raw))
    alone = r.rows(r.add(draw_tokens(5, LENGTH)), [1] * LENGTH)
    chunked = r.rows(r.add(draw_tokens(5, LENGTH)), [50] * 3)
    assert max(float((row - one_by_one[at]).abs().max()) for at, row in alone.items()) < 1e-4, "it computes attention"
    assert differing(chunked, alone) > 0
    assert differing(alone, one_by_one) > 0


# ---- the whole engine ----


def serve(d: Any, draw_tokens: Any, rows: list[torch.Tensor]) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Six requests that come one after another: (token, logits) of each."""
    rows.clear()
    source = random.Random(3)
    prompts = [draw_tokens(n, source.randint(3, 150)) for n in range(6)]
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for n, prompt in enumerate(prompts):
        params = SamplingParams(32, temperature=0.7 * (n % 2), seed=n, ignore_eos=True)
        d.submit(AddRequest(f"r{n}", prompt, params, d.clock.now))
        for _ in range(4):
            d.step(lambda: source.random() < 0.3)
    d.run(lambda: source.random() < 0.3)
    tokens = [token for batch in d.of(TokenBatch) for token in batch.tokens]
    assert len(tokens) == len(rows) == 6 * 32
    for token, row in zip(tokens, rows, strict=True):
        found.setdefault(token.request_id, []).append((token.token, row))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_engine_serves_the_same_bits_with_a_job(
    driver: Any,
    draw_tokens: Any,
    training: Callable[..., Any],
    sampled_logits: list[torch.Tensor],
    seed: int,
    start_job: Any,
) -> None:
    alone = serve(driver(jitter_s=0.008), draw_tokens, sampled_logits)
    both = driver(jitter_s=0.008, seed=seed)
    both.submit(start_job(), *training(steps=20))
    mixed = serve(both, draw_tokens, sampled_logits)
    together = [e for e in both.of(IterationDone) if e.decode_tokens and (e.finetune_tokens or e.backward_tokens)]
    assert len(together) > 20, "finetuning hardly ran beside requests"
    assert alone.keys() == mixed.keys()
    for name, expected in alone.items():
        for (token, row), (other_token, other_row) in zip(expected, mixed[name], strict=True):
            assert token == other_token
            assert torch.equal(row, other_row)
