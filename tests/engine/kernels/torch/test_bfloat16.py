"""In bfloat16 forward and gradients err, against float64, at most 1.5 times as much as transformers' and PEFT's do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bfloat16_reference import peft_gradient, reference_of, rounded_folder, widen_norms
from parity import BOUND, CHUNK, LENGTH, error, logits, rounded_adapter, samples, trained
from random_models import Adapter

from coserve_engine.tensors.kv_cache import KVCache

MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")


@pytest.fixture
def folder(model_path: Callable[[str], str], tmp_path: Path) -> Callable[[str], str]:
    """One of MODELS with weights that bfloat16 holds."""
    return lambda name: rounded_folder(model_path(name), tmp_path)


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_norms(monkeypatch)


def logits_ratio(r: Any, adapter: Adapter, tokens: tuple[int, ...]) -> float:
    """Our error over that of PEFT, of a chunk's last row and of all that are decoded after it."""
    path = r.executor.config.model_path
    exact = reference_of(path, adapter, torch.float64).logits(tokens)
    theirs = reference_of(path, adapter, torch.bfloat16).logits(tokens)
    return error(logits(r, adapter, tokens), exact[CHUNK - 1 :]) / error(theirs[CHUNK - 1 :], exact[CHUNK - 1 :])


def gradient_ratio(r: Any, adapter: Adapter) -> float:
    """Our gradient's error over that of PEFT's."""
    path = r.executor.config.model_path
    seqs = samples()
    exact = peft_gradient(reference_of(path, adapter, torch.float64), seqs, torch.float64)
    theirs = peft_gradient(reference_of(path, adapter, torch.bfloat16), seqs, torch.float32)
    state = trained(r, adapter, seqs)
    assert state.loss_sum() == pytest.approx(exact.loss, rel=1e-2)
    return error(state.grads, exact.gradient) / error(theirs.gradient, exact.gradient)


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
