"""Every loss's gradient is autograd's, its inputs belong to their tokens, and log-probabilities come when asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.job_messages import (
    ForwardBackward,
    JobFailed,
    LossName,
    Pass,
    PassDone,
    PassMode,
    TrainSeq,
)
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.model import executor as executor_module
from coserve_engine.model.losses import LOSSES

LENGTHS = (70, 5, 33)


def sequences(draw_tokens: Any, seed: int = 0) -> tuple[TrainSeq, ...]:
    """Random per-token weights (a third of them zero) and inputs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for uid, length in enumerate(LENGTHS):
        weights, old, advantages = torch.rand(3, length, generator=generator, dtype=torch.float64)
        weights[torch.rand(length, generator=generator) < 0.3] = 0.0
        tokens = draw_tokens(seed + uid, length)
        per_token = [tuple(values.tolist()) for values in (weights / 50, 2 * old - 6, 2 * advantages - 1)]
        made.append(TrainSeq(uid, tokens, per_token[0], 0, per_token[1], per_token[2]))
    return tuple(made)


def by_autograd(loss: LossName, reference: Any, seqs: tuple[TrainSeq, ...]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the formula as it is written in papers."""
    total = torch.zeros((), dtype=torch.float64)
    for seq in seqs:
        logp = torch.log_softmax(reference.model(torch.tensor([seq.tokens])).logits[0, :-1], -1)
        logp = logp.gather(1, torch.tensor(seq.tokens[1:]).unsqueeze(1)).squeeze(1)
        weights, old, advantages = (
            torch.tensor(values[1:], dtype=torch.float64) for values in (seq.weights, seq.old_logprobs, seq.advantages)
        )
        if loss is LossName.CROSS_ENTROPY:
            total = total - (weights * logp).sum()
        else:
            total = total - (weights * advantages * torch.exp(logp) / torch.exp(old)).sum()
    total.backward()
    layout, parameters = reference.adapter.layout, dict(reference.model.named_parameters())
    flat = torch.zeros_like(reference.adapter.flat)
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            stem = next(key for key in parameters if f"layers.{index}." in key and f"{name}.lora_A" in key)
            a[: layout.spec.rank] = parameters[stem].grad
            b[:, : layout.spec.rank] = parameters[stem.replace("lora_A", "lora_B")].grad
    return total.item(), flat


def run(r: Any, adapter: Any, loss: LossName, seqs: tuple[TrainSeq, ...]) -> tuple[float, torch.Tensor, Any]:
    """Loss, gradient and log-probabilities of one pass."""
    executor, work = r.executor, Pass(1, "job", 0, 0, seqs)
    pages = executor.ledger.reserve("pass:1", pages_of_pass(LENGTHS, executor.numerics))
    state = executor.open_pass(work, adapter.weights, adapter.layout, pages, loss=loss, want_logprobs=True)
    while not state.forward_done:
        r.forward(r.window(state, 1))
    while not state.done:
        executor.backward(r.unit(state, 1))
    logprobs, grads = state.terms.logprobs(), state.grads.clone()
    executor.close_pass(work.id)
    return state.loss_sum(), grads, logprobs


@pytest.fixture
def setting(rig: Any, random_adapter: Any, reference: Any, float64_norms: None) -> tuple[Any, Any, Any]:
    r = rig(dtype="float64")
    adapter = random_adapter(r.executor)
    return r, adapter, reference(r.executor, adapter)


@pytest.mark.parametrize("loss", list(LossName))
def test_the_gradient_is_autograds(setting: Any, draw_tokens: Any, loss: LossName) -> None:
    r, adapter, reference = setting
    seqs = sequences(draw_tokens)
    value, gradient, _ = run(r, adapter, loss, seqs)
    expected, expected_gradient = by_autograd(loss, reference, seqs)
    assert value == pytest.approx(expected, rel=1e-6)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-6


@pytest.mark.parametrize("loss", list(LossName))
def test_a_slope_that_is_off_by_a_little_fails(
    setting: Any, draw_tokens: Any, loss: LossName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    r, adapter, reference = setting

    def off(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, slope = LOSSES[loss].coefficient(*args)
        return value, slope.roll(1)

    monkeypatch.setattr(executor_module, "LOSSES", {loss: replace(LOSSES[loss], coefficient=off)})
    seqs = sequences(draw_tokens)
    _, gradient, _ = run(r, adapter, loss, seqs)
    _, expected = by_autograd(loss, reference, seqs)
    assert (gradient - expected).norm() / expected.norm() > 1e-2


def test_logprobs_are_those_of_the_tokens(setting: Any, draw_tokens: Any) -> None:
    r, adapter, reference = setting
    seqs = sequences(draw_tokens)
    _, _, logprobs = run(r, adapter, LossName.CROSS_ENTROPY, seqs)
    for seq, found in zip(seqs, logprobs, strict=True):
        logp = torch.log_softmax(reference.logits(seq.tokens), -1)
        assert len(found) == len(seq.tokens)
        assert found[0] is None
        for at in range(1, len(seq.tokens)):
            if seq.weights[at] == 0:
                assert found[at] is None
            else:
                assert found[at] == pytest.approx(float(logp[at - 1, seq.tokens[at]]), rel=1e-6)


@pytest.mark.parametrize("mode", list(PassMode))
def test_a_job_may_ask_for_them(driver: Any, start_job: Any, draw_tokens: Any, mode: PassMode) -> None:
    d = driver()
    work = Pass(1, "job", 0, 0, sequences(draw_tokens), mode)
    d.submit(start_job(), *(ForwardBackward("job", n, work, want_logprobs=n == 2) for n in (1, 2)))
    without, with_them = d.run().of(PassDone)
    assert without.logprobs is None
    assert with_them.logprobs is not None
    total = sum(
        -w * p
        for seq, found in zip(work.seqs, with_them.logprobs, strict=True)
        for w, p in zip(seq.weights, found, strict=True)
        if p is not None
    )
    assert with_them.loss_sum == pytest.approx(total, rel=1e-5)


def test_importance_sampling_on_policy_is_the_policy_gradient(setting: Any, draw_tokens: Any) -> None:
    """With the model's own log-probabilities the ratio is one: the gradient is that of -w A logp."""
    r, adapter, reference = setting
    seqs = sequences(draw_tokens)
    _, _, own = run(r, adapter, LossName.CROSS_ENTROPY, seqs)
    on_policy = tuple(
        replace(seq, old_logprobs=tuple(p or 0.0 for p in found)) for seq, found in zip(seqs, own, strict=True)
    )
    value, gradient, _ = run(r, adapter, LossName.IMPORTANCE_SAMPLING, on_policy)
    products = [tuple(w * a for w, a in zip(seq.weights, seq.advantages, strict=True)) for seq in seqs]
    assert value == pytest.approx(-sum(sum(p[1:]) for p in products), rel=1e-9)
    weighted = tuple(replace(seq, weights=p) for seq, p in zip(seqs, products, strict=True))
    _, expected = by_autograd(LossName.CROSS_ENTROPY, reference, weighted)
    assert (gradient - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"old_logprobs": ()}, "0 old_logprobs"),
        ({"advantages": (1.0,)}, "1 advantages"),
        ({"advantages": (float("nan"),) * 5}, "not finite"),
    ],
)
def test_inputs_that_do_not_fit(
    driver: Any, start_job: Any, draw_tokens: Any, change: dict[str, Any], named: str
) -> None:
    d = driver()
    seq = replace(sequences(draw_tokens)[1], **change)
    d.submit(start_job(), ForwardBackward("job", 1, Pass(1, "job", 0, 0, (seq,)), LossName.IMPORTANCE_SAMPLING))
    failed = d.run().one(JobFailed)
    assert failed.code == "invalid_command"
    assert named in failed.message
    assert "sample 1" in failed.message
