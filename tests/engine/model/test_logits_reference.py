"""Logits and greedy tokens are those of transformers, and with adapters those of PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coserve_engine.kernels import functional
from coserve_engine.messages import AddRequest, SamplingParams
from coserve_engine.scheduler.plan import Kind, Segment

MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")
GREEDY = SamplingParams(32, ignore_eos=True)


def expected_logits(path: str, tokens: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(torch.tensor([tokens])).logits[0]


def largest_error(rig: Any, path: str, tokens: tuple[int, ...]) -> float:
    """Over a prefill of 70 tokens and the rest one by one."""
    found = rig.rows(rig.add(tokens), [70] + [1] * (len(tokens) - 70))
    expected = expected_logits(path, tokens, rig.executor.dtype)
    return max(float((row - expected[at]).abs().max()) for at, row in found.items())


@pytest.mark.parametrize("model", MODELS)
def test_float32_logits_are_transformers(rig: Any, model_path: Any, draw_tokens: Any, model: str) -> None:
    path = model_path(model)
    assert largest_error(rig(path), path, draw_tokens(1, 140)) < 1e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("float64_norms")
def test_float64_logits_are_transformers(rig: Any, model_path: Any, draw_tokens: Any, model: str) -> None:
    path = model_path(model)
    assert largest_error(rig(path, dtype="float64"), path, draw_tokens(1, 140)) < 1e-10


def test_logits_differ_without_rotary_embedding(
    rig: Any, plain: str, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "rotate", lambda x, cos, sin: x)
    assert largest_error(rig(), plain, draw_tokens(1, 80)) > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_transformers(driver: Any, model_path: Any, draw_tokens: Any, model: str) -> None:
    path = model_path(model)
    prompts = {f"r{n}": draw_tokens(n, n) for n in (1, 17, 64, 100)}
    d = driver(path)
    d.submit(*(AddRequest(name, prompt, GREEDY, 0.0) for name, prompt in prompts.items()))
    found = d.run().tokens()
    hf = AutoModelForCausalLM.from_pretrained(path)
    for name, prompt in prompts.items():
        whole = (*prompt, *found[name])
        with torch.no_grad():
            expected = hf(torch.tensor([whole])).logits[0].argmax(-1).tolist()
        assert found[name] == expected[len(prompt) - 1 : -1]
        assert len(found[name]) == 32


def mixed_batch(rig: Any, slots: list[int], length: int) -> dict[int, torch.Tensor]:
    """Prefill of all slots but their last token in one batch, then the last tokens decoded in one batch."""
    first = rig.forward(*(Segment(Kind.PREFILL, slot, 0, length - 1, sample=True) for slot in slots))
    assert set(first) == set(slots)
    return rig.forward(*(Segment(Kind.DECODE, slot, length - 1, 1, sample=True) for slot in slots))


def test_adapters_of_different_ranks_share_a_batch(
    rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any, plain: str
) -> None:
    r, length = rig(), 75
    adapters = [
        random_adapter(r.executor, rank=4, seed=1),
        random_adapter(r.executor, rank=6, seed=2, targets=("q_proj", "v_proj", "down_proj")),
        random_adapter(r.executor, rank=16, seed=3),
    ]
    prompts = [draw_tokens(seed, length) for seed in range(4)]
    slots = [r.add(prompts[0]), *(r.add(p, a) for p, a in zip(prompts[1:], adapters, strict=True))]
    found = mixed_batch(r, slots, length)
    base = expected_logits(plain, prompts[0], torch.float32)[-1]
    assert (found[slots[0]] - base).abs().max() < 1e-4
    for slot, prompt, adapter in zip(slots[1:], prompts[1:], adapters, strict=True):
        expected = reference(r.executor, adapter).logits(prompt)[-1]
        assert (found[slot] - expected).abs().max() < 1e-4
        assert (found[slot] - expected_logits(plain, prompt, torch.float32)[-1]).abs().max() > 1e-2, "no adapter at all"


def test_base_rows_do_not_notice_adapters(rig: Any, draw_tokens: Any, random_adapter: Any) -> None:
    r, length = rig(), 75
    adapters = [random_adapter(r.executor, rank=rank, seed=rank) for rank in (4, 6, 16)]
    base, others = draw_tokens(0, length), [draw_tokens(seed, length) for seed in (1, 2, 3)]
    alone = mixed_batch(r, [r.add(base)], length)[1]
    with_adapters = [r.add(base), *(r.add(p, a) for p, a in zip(others, adapters, strict=True))]
    without = [r.add(p) for p in (base, *others)]
    mixed, plain_rows = mixed_batch(r, with_adapters, length), mixed_batch(r, without, length)
    assert torch.equal(mixed[with_adapters[0]], alone)
    assert torch.equal(plain_rows[without[0]], alone)
    assert not torch.equal(mixed[with_adapters[1]], plain_rows[without[1]]), "the adapters did nothing"
