"""Reported log-probabilities are the model's own, and the very bits that training and evaluation compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    IterationDone,
    Pass,
    PassMode,
    PromptDone,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
    TrainSeq,
)
from coserve_engine.model import outcome
from coserve_engine.numerics import Numerics

VERSION = AdapterVersion("a", 1)
ASK = SamplingParams(12, temperature=0.8, seed=3, ignore_eos=True, logprobs=3)


def of_output(d: Any, name: str = "r") -> list[TokenLogprobs]:
    return [t.logprobs for batch in d.of(TokenBatch) for t in batch.tokens if t.request_id == name]


def of_prompt(d: Any, name: str = "r") -> Any:
    return next(e.logprobs for e in d.of(PromptDone) if e.request_id == name)


def score(d: Any, prompt: Any, params: SamplingParams, adapter: AdapterVersion | None = None) -> list[int]:
    d.submit(AddRequest("r", tuple(prompt), params, d.clock.now, adapter))
    return [*prompt, *d.run().tokens()["r"]]


def trained(rig: Any, adapter: Any, tokens: list[int], mode: PassMode) -> torch.Tensor:
    """Log-probabilities of tokens[1:] as a pass reports them."""
    work = Pass(1, "job", 0, 0, (TrainSeq(0, tuple(tokens), (0.01,) * len(tokens)),), mode)
    state, e = rig.open(work, adapter, want_logprobs=True), rig.executor
    while not state.forward_done:
        rig.forward(rig.window(state, 1))
    while state.layer == e.model.layers:
        e.backward(rig.unit(state, 2))
    first, *found = state.terms.logprobs()[0]
    assert first is None
    e.close_pass(work.id)
    return torch.tensor(found)


@pytest.mark.parametrize("mode", PassMode)
@pytest.mark.parametrize("length", (5, 64, 100))
def test_sampler_and_trainer_agree_in_every_bit(
    driver: Any, rig: Any, draw_tokens: Any, random_adapter: Any, mode: PassMode, length: int
) -> None:
    """Log-probabilities of an output while it was sampled, of the same tokens as a prompt, and of a pass over them."""
    r = rig()
    adapter = random_adapter(r.executor, rank=5)
    d = driver()
    d.engine._adapters[VERSION] = adapter.weights
    d.submit(AddRequest("other", draw_tokens(9, 30), ASK, 0.0))
    tokens = score(d, draw_tokens(5, length), ASK, VERSION)
    sampled = torch.tensor([one.logprob for one in of_output(d)])
    expected = trained(r, adapter, tokens, mode)
    assert expected.shape == (length + 11,)
    assert torch.equal(sampled, expected[length - 1 :])
    again = driver(max_batch_tokens=23)
    again.engine._adapters[VERSION] = adapter.weights
    score(again, tokens, replace(ASK, prompt_logprobs=0), VERSION)
    first, *rest = of_prompt(again)
    assert first is None
    assert torch.equal(torch.tensor([one.logprob for one in rest]), expected)


@pytest.mark.parametrize("broken", ("another function", "other weights", "raw rows"))
def test_the_comparison_notices(
    driver: Any, rig: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    r = rig()
    adapter = random_adapter(r.executor, rank=5)
    d = driver()
    d.engine._adapters[VERSION] = adapter.weights
    if broken == "another function":
        monkeypatch.setattr(
            d.engine.executor, "log_probabilities", lambda logits: logits.double().log_softmax(-1).float()
        )
    elif broken == "raw rows":
        monkeypatch.setattr(d.engine.executor, "log_probabilities", lambda logits: (logits / 0.8).log_softmax(-1))
    tokens = score(d, draw_tokens(5, 70), ASK, None if broken == "other weights" else VERSION)
    expected = trained(r, adapter, tokens, PassMode.EVAL)
    assert not torch.equal(torch.tensor([one.logprob for one in of_output(d)]), expected[69:])


def test_they_are_transformers_log_softmax(
    driver: Any, rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any, float64_norms: None
) -> None:
    r = rig(dtype="float64")
    adapter = random_adapter(r.executor)
    d = driver(dtype="float64")
    d.engine._adapters[VERSION] = adapter.weights
    prompt = draw_tokens(5, 70)
    tokens = score(d, prompt, replace(ASK, prompt_logprobs=5, repetition_penalty=1.5, top_k=4), VERSION)
    logp = torch.log_softmax(reference(r.executor, adapter).logits(tokens), -1)
    for at, one in enumerate([*of_prompt(d)[1:], *of_output(d)]):
        assert one.logprob == pytest.approx(float(logp[at, tokens[at + 1]]), abs=1e-9)
        assert one.rank == int((logp[at] >= logp[at, tokens[at + 1]]).sum())
        best = logp[at].topk(5 if at < 69 else 3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-9)


def test_nothing_is_reported_unasked(driver: Any, draw_tokens: Any) -> None:
    d = driver()
    score(d, draw_tokens(5, 40), replace(ASK, logprobs=None))
    assert set(of_output(d)) == {None}
    assert of_prompt(d) is None
    zero = driver()
    score(zero, draw_tokens(5, 40), replace(ASK, logprobs=0))
    assert {one.top for one in of_output(zero)} == {()}


def test_a_prompt_is_scored_in_pieces_and_computed_whole(
    driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cached; of a long prompt's logits only a few rows exist at once."""
    d = driver()
    rows: list[int] = []
    log_probabilities = d.engine.executor.log_probabilities

    def spy(scores: torch.Tensor) -> torch.Tensor:
        rows.append(scores.shape[0])
        return log_probabilities(scores)

    monkeypatch.setattr(d.engine.executor, "log_probabilities", spy)
    prompt = draw_tokens(5, 200)
    for name in ("first", "second"):
        d.submit(AddRequest(name, prompt, SamplingParams(1, ignore_eos=True, prompt_logprobs=2), 0.0))
        d.run()
    assert max(rows) <= outcome.SCORED_ROWS
    assert [e.cached_tokens for e in d.of(PromptDone)] == [0, 0]
    assert sum(e.prefill_tokens for e in d.of(IterationDone)) == 400
    assert of_prompt(d, "first") == of_prompt(d, "second")
    assert len(of_prompt(d, "first")) == 200
    d.submit(AddRequest("third", prompt, SamplingParams(1, ignore_eos=True), 0.0))
    d.run()
    assert d.of(PromptDone)[-1].cached_tokens == 192


def test_a_preempted_prompt_is_scored_once(driver: Any, draw_tokens: Any) -> None:
    """Put out before its first token, when part of its log-probabilities are there."""
    params = SamplingParams(100, ignore_eos=True, prompt_logprobs=0)
    alone = driver()
    score(alone, draw_tokens(2, 100), params)
    d = driver(kv_cache_bytes=20 * 8192, max_batch_tokens=20, numerics=Numerics(page=16))
    d.submit(AddRequest("old", draw_tokens(1, 60), SamplingParams(150, ignore_eos=True), 0.0))
    d.submit(AddRequest("r", draw_tokens(2, 100), params, 0.0))
    for _ in range(6):
        d.step()
    assert d.engine.requests.running[2].prompt_logprobs
    d.engine.requests.preempt_youngest()
    d.run()
    assert of_prompt(d) == of_prompt(alone)
    assert sum(e.request_id == "r" for e in d.of(PromptDone)) == 1
