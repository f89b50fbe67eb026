"""In bfloat16 forward and gradients err, against float64, at most 1.5 times as much as transformers' and PEFT's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_reference import Adapter, Reference
from transformers import AutoModelForCausalLM

from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.lora import LoraWeights

BOUND = 1.5
LENGTH, CHUNK = 140, 70
MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")


class Computed(Adapter):
    """An adapter that is computed with in bfloat16."""

    @property
    def weights(self) -> LoraWeights:
        return LoraWeights.trained(self.layout, self.flat, torch.bfloat16)


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


def rounded(executor: Any, random_adapter: Any) -> Adapter:
    """A float32 adapter of values that bfloat16 holds."""
    layout = random_adapter(executor).layout
    flat = layout.fresh(5, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for layer in layout.views(flat):
        for _, b in layer.values():
            b[:, : layout.spec.rank] = 0.1 * torch.randn(b.shape[0], layout.spec.rank, generator=generator)
    return Computed(layout, flat.bfloat16().float())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def logits_ratio(r: Any, adapter: Adapter, tokens: tuple[int, ...]) -> float:
    """Our error over that of PEFT, of a chunk's last row and of all that are decoded after it."""
    path = r.executor.config.model_path
    exact = Reference.of(path, torch.float64, replace(adapter, flat=adapter.flat.double())).logits(tokens)
    theirs = Reference.of(path, torch.bfloat16, adapter).logits(tokens)
    rows = r.rows(r.add(tokens, adapter), [CHUNK] + [1] * (LENGTH - CHUNK))
    ours = torch.stack([rows[at] for at in range(CHUNK - 1, LENGTH)])
    assert ours.dtype is r.executor.dtypes.accumulate
    return error(ours, exact[CHUNK - 1 :]) / error(theirs[CHUNK - 1 :], exact[CHUNK - 1 :])


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


def gradient_ratio(r: Any, adapter: Adapter, draw_tokens: Any) -> float:
    """Our gradient's error over that of PEFT's."""
    path = r.executor.config.model_path
    seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.01,) * size) for n, size in enumerate((83, 5, 140)))
    wide = replace(adapter, flat=adapter.flat.double())
    loss, exact = peft_gradient(Reference.of(path, torch.float64, wide), seqs, torch.float64)
    _, theirs = peft_gradient(Reference.of(path, torch.bfloat16, adapter), seqs, torch.float32)
    state = r.run_pass(Pass(1, "job", 0, 0, seqs), adapter, window=lambda: 2, unit=lambda: 2)
    assert state.grads.dtype is r.executor.dtypes.lora
    assert state.loss_sum() == pytest.approx(loss, rel=1e-2)
    return error(state.grads, exact) / error(theirs, exact)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("model", MODELS)
def test_errors_are_at_most_theirs_and_a_half(
    rig: Any, folder: Any, random_adapter: Any, draw_tokens: Any, model: str
) -> None:
    r = rig(folder(model), dtype="bfloat16")
    adapter = rounded(r.executor, random_adapter)
    ratios = {
        "logits": logits_ratio(r, adapter, draw_tokens(1, LENGTH)),
        "gradient": gradient_ratio(r, adapter, draw_tokens),
    }
    assert max(ratios.values()) < BOUND, ratios


@pytest.mark.usefixtures("wide_norms")
def test_keys_in_eight_bits_show(
    rig: Any, folder: Any, random_adapter: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the least that another cache would do to them."""
    write = KVCache.write

    def coarse(self: KVCache, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        write(self, layer, index, k.to(torch.float8_e4m3fn).to(k.dtype), v)

    monkeypatch.setattr(KVCache, "write", coarse)
    r = rig(folder("plain"), dtype="bfloat16")
    adapter = rounded(r.executor, random_adapter)
    assert logits_ratio(r, adapter, draw_tokens(1, LENGTH)) > BOUND
    assert gradient_ratio(r, adapter, draw_tokens) > BOUND
