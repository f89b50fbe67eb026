"""On plain operators logits and gradients are transformers' and PEFT's to 1e-10 in float64, kept or computed again."""

from __future__ import annotations

from typing import Any

import pytest
from tables import use_torch

from coserve_engine.kernels.torch import table
from coserve_engine.messages import Pass, TrainSeq

MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")
pytestmark = pytest.mark.usefixtures("float64_norms")


@pytest.fixture(autouse=True)
def _on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch)


def float64_rig(rig: Any, path: str, pass_bytes: int | None = None) -> Any:
    return rig(path, dtype="float64", kv_cache_bytes=8 << 20, pass_bytes=pass_bytes)


def gradient_error(r: Any, draw_tokens: Any, random_adapter: Any, reference: Any) -> float:
    """The largest difference, of several sequences at once, cut into windows and units."""
    adapter = random_adapter(r.executor, rank=6)
    seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.01,) * size) for n, size in enumerate((83, 5, 140)))
    state = r.run_pass(Pass(1, "job", 0, 0, seqs), adapter, window=lambda: 2, unit=lambda: 2)
    loss, expected = reference(r.executor, adapter).gradients(seqs)
    assert state.loss_sum() == pytest.approx(loss, rel=1e-12)
    assert float(expected.abs().max()) > 1e-3
    return float((state.grads - expected).abs().max())


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_the_references(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, reference: Any, model: str
) -> None:
    r, tokens = float64_rig(rig, model_path(model)), draw_tokens(1, 140)
    adapter = random_adapter(r.executor, rank=6)
    found = r.rows(r.add(tokens, adapter), [70] + [1] * 70)
    expected = reference(r.executor, adapter).logits(tokens)
    assert max(float((row - expected[at]).abs().max()) for at, row in found.items()) < 1e-10


@pytest.mark.parametrize("pass_bytes", (None, 0))
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_references(
    rig: Any,
    model_path: Any,
    draw_tokens: Any,
    random_adapter: Any,
    reference: Any,
    model: str,
    pass_bytes: int | None,
) -> None:
    r = float64_rig(rig, model_path(model), pass_bytes)
    assert gradient_error(r, draw_tokens, random_adapter, reference) < 1e-10


def test_without_the_adapters_part_of_dx_they_are_not(
    rig: Any, plain: str, draw_tokens: Any, random_adapter: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    whole = table.adapter_backward

    def partial(*args: Any) -> None:
        *rest, _ = args
        whole(*rest, None)

    monkeypatch.setattr(table, "adapter_backward", partial)
    assert gradient_error(float64_rig(rig, plain), draw_tokens, random_adapter, reference) > 1e-6
