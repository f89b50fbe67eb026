"""The probe at start-up is silent where the promise of equal bits holds, and speaks where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.errors import EngineConfigError
from coserve_engine.host import on_intel
from coserve_engine.kernels.attention import Attention, Mask
from coserve_engine.model.probe import probe_row_invariance
from coserve_engine.model.transformer import Transformer


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("model", ("plain", "wide", "qwen3", "smol"))
def test_it_is_silent_here(rig: Any, model_path: Callable[[str], str], model: str, dtype: str) -> None:
    if on_intel() and (model, dtype) == ("smol", "float64"):
        pytest.skip("it is in an engine's own process, which asks MKL for strict sums")
    r = rig(model_path(model), dtype=dtype, kv_cache_bytes=64 << 20)
    assert probe_row_invariance(r.executor.transformer, backward=True) == ()


def test_serving_alone_needs_no_backward(rig: Any) -> None:
    assert probe_row_invariance(rig(finetuning=False).executor.transformer, backward=False) == ()


class OtherOrderForFewRows:
    """A linear that adds up rows of a small batch in another order."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight if x.shape[0] >= 32 else x.flip(1) @ weight.flip(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self._weight.t())

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        return self._product(dy, self._weight)


@pytest.mark.parametrize("backward", (False, True))
def test_a_linear_that_depends_on_the_number_of_rows(rig: Any, backward: bool) -> None:
    transformer: Transformer = rig().executor.transformer
    layer = transformer.weights.layers[0]
    odd = OtherOrderForFewRows(torch.randn(transformer.config.linear_shape("down_proj")))
    layers = (replace(layer, linears={**layer.linears, "down_proj": odd}), *transformer.weights.layers[1:])
    broken = replace(transformer, weights=replace(transformer.weights, layers=layers))
    found = ("down_proj", "down_proj backward") if backward else ("down_proj",)
    assert probe_row_invariance(broken, backward=backward) == found


def test_a_head_that_depends_on_the_number_of_rows(rig: Any) -> None:
    transformer: Transformer = rig().executor.transformer
    odd = OtherOrderForFewRows(torch.randn(transformer.weights.embed.shape))
    broken = replace(transformer, weights=replace(transformer.weights, head=odd))
    assert probe_row_invariance(broken, backward=True) == ("head", "head backward")


def test_attention_that_depends_on_the_number_of_rows(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in the log; an engine that was to be exact does not start."""
    granted = driver(numerics_mode="exact").engine.ready().notes
    assert [note for note in granted if "numericsMode" in note] == [
        "engine.numericsMode is Exact: rows and gradients have the same bits in any batch here"
    ]
    attend = Attention.attend

    def other_order_for_few(
        self: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            attend(self, q, k, v, mask, first) if q.shape[0] > 5 else attend(self, q.flip(2), k.flip(2), v, mask, first)
        )

    assert not any("not bit-exact" in note for note in driver().engine.ready().notes)
    monkeypatch.setattr(Attention, "attend", other_order_for_few)
    notes = driver().engine.ready().notes
    assert ["rows of attention depend" in note for note in notes if "not bit-exact" in note] == [True]
    with pytest.raises(EngineConfigError, match=r"Mode is Exact, .* rows of attention depend .* set .* to Fast"):
        driver(numerics_mode="exact").engine.ready()
