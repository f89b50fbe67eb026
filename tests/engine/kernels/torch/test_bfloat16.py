"""In bfloat16 forward and gradients err, against float64, at most 1.5 times as much as transformers' and PEFT's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import BOUND, CHUNK, LENGTH, error, logits, rounded_adapter, samples, trained
from peft_reference import Reference
from random_models import Adapter
from transformers import AutoModelForCausalLM

from coserve_engine.messages import TrainSeq
from coserve_engine.tensors.kv_cache import KVCache

MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")


@pytest.fixture
def folder(model_path: Callable[[str], str], tmp_path: Path) -> Callable[[str], str]:
    """One of MODELS with weights that bfloat16 holds: errors are of arithmetic alone."""

    def make(name: str) -> str:
        AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32, even where the reference is float64."""
    to = torch.Tensor.to

    def kept(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self if self.dtype is torch.float64 and args == (torch.float32,) else to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", kept)


def logits_ratio(r: Any, adapter: Adapter, tokens: tuple[int, ...]) -> float:
    """Our error over that of PEFT, of a chunk's last row and of all that are decoded after it."""
    path = r.executor.config.model_path
    exact = Reference.of(path, torch.float64, replace(adapter, flat=adapter.flat.double())).logits(tokens)
    theirs = Reference.of(path, torch.bfloat16, adapter).logits(tokens)
    return error(logits(r, adapter, tokens), exact[CHUNK - 1 :]) / error(theirs[CHUNK - 1 :], exact[CHUNK - 1 :])


def peft_gradient(reference: Reference, seqs: Sequence[TrainSeq], wide: torch.dtype) -> tuple[float, torch.Tensor]:
    """Loss and gradient, the loss from logits in `wide`, as Trainers take it."""
    total = torch.zeros((), dtype=wide)
    for seq in seqs:
        logits = reference.model(torch.tensor([seq.tokens])).logits[0, :-1].to(wide)
        picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(seq.tokens[1:]).unsqueeze(1)).squeeze(1)
        total = total - (picked * torch.tensor(seq.weights[1:], dtype=wide)).sum()
    total.backward()
    layout, parameters = reference.adapter.layout, dict(reference.model.named_parameters())
    flat = torch.zeros(layout.size, dtype=torch.float64)
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            (stem,) = (key for key in parameters if f"layers.{index}." in key and f"{name}.lora_A" in key)
            a[: layout.spec.rank] = parameters[stem].grad
            b[:, : layout.spec.rank] = parameters[stem.replace("lora_A", "lora_B")].grad
    return total.item(), flat


def gradient_ratio(r: Any, adapter: Adapter) -> float:
    """Our gradient's error over that of PEFT's."""
    path = r.executor.config.model_path
    seqs = samples()
    wide = replace(adapter, flat=adapter.flat.double())
    loss, exact = peft_gradient(Reference.of(path, torch.float64, wide), seqs, torch.float64)
    _, theirs = peft_gradient(Reference.of(path, torch.bfloat16, adapter), seqs, torch.float32)
    state = trained(r, adapter, seqs)
    assert state.loss_sum() == pytest.approx(loss, rel=1e-2)
    return error(state.grads, exact) / error(theirs, exact)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("model", MODELS)
def test_errors_are_at_most_theirs_and_a_half(rig: Any, folder: Any, draw_tokens: Any, model: str) -> None:
    r = rig(folder(model), dtype="bfloat16")
    adapter = rounded_adapter(r.executor)
    ratios = {
        "logits": logits_ratio(r, adapter, draw_tokens(1, LENGTH)),
        "gradient": gradient_ratio(r, adapter),
    }
    assert max(ratios.values()) < BOUND, ratios


@pytest.mark.usefixtures("wide_norms")
def test_keys_in_eight_bits_show(rig: Any, folder: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the least that another cache would do to them."""
    write = KVCache.write

    def coarse(self: KVCache, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        write(self, layer, index, k.to(torch.float8_e4m3fn).to(k.dtype), v)

    monkeypatch.setattr(KVCache, "write", coarse)
    r = rig(folder("plain"), dtype="bfloat16")
    adapter = rounded_adapter(r.executor)
    assert logits_ratio(r, adapter, draw_tokens(1, LENGTH)) > BOUND
    assert gradient_ratio(r, adapter) > BOUND
