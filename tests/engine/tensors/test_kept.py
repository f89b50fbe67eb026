"""What is kept for backward fits its bound, and what is computed again changes no bit of a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.config import ModelConfig, Rope
from coserve_engine.kernels.bound import BoundUnit
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.tensors.kept import levels, plan_kept, row_values
from coserve_engine.tensors.lora import LoraLayout


def config(layers: int, *, qk_norm: bool) -> ModelConfig:
    windows = (None,) * layers
    return ModelConfig(32, 64, layers, 4, 2, 16, 160, 1e-5, Rope(1e4), 512, (), qk_norm, windows, False, ())


@given(layers=st.integers(1, 6), qk_norm=st.booleans(), row_bytes=st.integers(4, 4096), limit=st.integers(0, 10**8))
def test_a_plan_keeps_as_much_as_fits(layers: int, qk_norm: bool, row_bytes: int, limit: int) -> None:
    model = config(layers, qk_norm=qk_norm)
    most, middle, least = (row_bytes * row_values(shapes) for shapes in levels(model))
    kept = [row_bytes * row_values(shapes) for shapes in plan_kept(model, row_bytes, limit)]
    assert set(kept) <= {most, middle, least}
    assert sum(kept) <= limit or kept == [least] * layers
    if sum(kept) < layers * most:
        step = max(middle, least) if middle in kept else most
        assert sum(kept) + (most - middle if least not in kept else step - least) > limit, "one more would have fitted"


def test_without_a_limit_everything_is_kept() -> None:
    model = config(3, qk_norm=True)
    assert plan_kept(model, 4, None) == (levels(model)[0],) * 3


def gradient(rig: Any, path: str, draw_tokens: Any, random_adapter: Any, share: float | None) -> torch.Tensor:
    """Of a pass that may keep this share of everything."""
    seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.01,) * size) for n, size in enumerate((130, 5, 70)))
    r = rig(path)
    whole = row_values(levels(r.executor.model)[0]) * r.executor.model.layers * 4 * (132 + 8 + 72)
    r = rig(path, pass_bytes=None if share is None else int(share * whole))
    adapter = random_adapter(r.executor)
    adapter = replace(adapter, layout=LoraLayout(r.executor.model, replace(adapter.layout.spec, dropout=0.2)))
    state = r.run_pass(Pass(1, "job", 0, 0, seqs), adapter, unit=lambda: 2)
    kept = sum(tensor.nbytes for layer in state.kept for tensor in layer.values())
    assert kept == whole if share is None else kept < whole
    found: torch.Tensor = state.grads
    return found


@pytest.mark.parametrize("model", ("plain", "llama31", "qwen2", "qwen3"))
@pytest.mark.parametrize("share", (0.9, 0.5, 0.3, 0.0))
def test_what_is_computed_again_changes_no_bit(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, model: str, share: float
) -> None:
    path = model_path(model)
    whole = gradient(rig, path, draw_tokens, random_adapter, None)
    assert torch.equal(gradient(rig, path, draw_tokens, random_adapter, share), whole)


def test_computing_again_without_the_adapter_shows(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradient(rig, model_path("plain"), draw_tokens, random_adapter, None)
    monkeypatch.setattr(BoundUnit, "adapters", ())
    assert not torch.equal(gradient(rig, model_path("plain"), draw_tokens, random_adapter, 0.5), whole)
