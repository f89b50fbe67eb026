"""The whole path by kernels: logits and gradients are as near to transformers' and PEFT's as arithmetic allows."""

from __future__ import annotations

from typing import Any

import pytest
from parity import LENGTH, error, logits, samples, trained
from tables import use_triton

from coserve_engine.kernels.triton import table

pytestmark = pytest.mark.usefixtures("float64_norms")
CHUNK = LENGTH - 5


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)


def errors(rig: Any, path: str, draw_tokens: Any, random_adapter: Any, reference: Any) -> dict[str, float]:
    """Of logits and gradient in float32, against float64."""
    r, tokens = rig(path), draw_tokens(1, LENGTH)
    adapter = random_adapter(r.executor, rank=6)
    wide = reference(r.executor, adapter)
    state = trained(r, adapter, samples())
    _, gradient = wide.gradients(samples())
    return {
        "logits": error(logits(r, adapter, tokens, CHUNK), wide.logits(tokens)[CHUNK - 1 :].double()),
        "gradient": error(state.grads, gradient.double()),
    }


@pytest.mark.parametrize(
    "model", ["plain", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("mistral", "qwen3"))]
)
def test_it_computes_what_peft_does(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, reference: Any, model: str
) -> None:
    found = errors(rig, model_path(model), draw_tokens, random_adapter, reference)
    assert max(found.values()) < 1e-5, found


@pytest.mark.nightly
def test_a_kernel_that_errs_shows(
    rig: Any, plain: str, draw_tokens: Any, random_adapter: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    real = table.silu_gate
    monkeypatch.setattr(table, "silu_gate", lambda gate, up: real(gate, up) * (1 + 1e-4))
    found = errors(rig, plain, draw_tokens, random_adapter, reference)
    assert min(found.values()) > 1e-5, found
