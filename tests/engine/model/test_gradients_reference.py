"""Gradients of all seven linears are PEFT's to 1e-10 in float64, for any tile size, with requests in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coserve_engine.kernels.attention import Attention
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment

pytestmark = pytest.mark.usefixtures("float64_norms")
TILES = (1, 7, 64, 256)
"""256 covers every sequence below: one full window."""


def sequences(draw_tokens: Any) -> tuple[TrainSeq, ...]:
    """Three sequences, padded and not, with masked prompts and uneven weights."""
    lengths = (83, 5, 40)
    return tuple(
        TrainSeq(
            n, draw_tokens(n, length), tuple(0.0 if i < length // 4 else 0.01 * (1 + i % 3) for i in range(length))
        )
        for n, length in enumerate(lengths)
    )


class Decoding:
    """A request that gets one token between every two units."""

    def __init__(self, rig: Any, tokens: tuple[int, ...], adapter: Any) -> None:
        self._rig, self._tokens = rig, tokens
        self._slot = rig.add(tokens, adapter)
        self._at = 0
        self.found: list[torch.Tensor] = []

    def __call__(self) -> None:
        if self._at == len(self._tokens):
            self._at = 0
        logits = self._rig.forward(Segment(Kind.DECODE, self._slot, self._at, 1, sample=True))
        self.found.append(logits[self._slot])
        self._at += 1


def float64_rig(rig: Any, tile: int, path: str | None = None) -> Any:
    return rig(path, dtype="float64", numerics=Numerics(tile=tile), kv_cache_bytes=8 << 20)


def error(r: Any, draw_tokens: Any, random_adapter: Any, reference: Any, **how: Any) -> float:
    """Largest difference of any gradient from PEFT's."""
    adapter = random_adapter(r.executor, rank=6)
    work = Pass(1, "job", 0, 0, sequences(draw_tokens))
    state = r.run_pass(work, adapter, **how)
    loss, expected = reference(r.executor, adapter).gradients(work.seqs)
    assert float(expected.abs().max()) > 1e-3
    assert abs(state.loss_sum() - loss) < 1e-10 * loss
    return float((state.grads - expected).abs().max())


@pytest.mark.parametrize("tile", TILES)
def test_gradients_are_pefts(rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any, tile: int) -> None:
    r = float64_rig(rig, tile)
    other = random_adapter(r.executor, rank=16, seed=9)
    tokens = draw_tokens(77, 90)
    request = Decoding(r, tokens, other)
    assert error(r, draw_tokens, random_adapter, reference, between=request) < 1e-10
    undisturbed = float64_rig(rig, tile)
    expected = undisturbed.rows(undisturbed.add(tokens, other), [1] * len(tokens))
    assert len(request.found) > 8
    assert all(torch.equal(row, expected[n % len(tokens)]) for n, row in enumerate(request.found))


@pytest.mark.parametrize("model", ("wide", "llama31", "mistral", "qwen2", "qwen3"))
@pytest.mark.parametrize("tile", TILES[:3])
def test_gradients_of_other_architectures(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, reference: Any, model: str, tile: int
) -> None:
    r = float64_rig(rig, tile, model_path(model))
    assert error(r, draw_tokens, random_adapter, reference) < 1e-10


def test_some_linears_only(rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any) -> None:
    r = float64_rig(rig, 64)
    adapter = random_adapter(r.executor, targets=("v_proj", "up_proj"))
    work = Pass(1, "job", 0, 0, sequences(draw_tokens))
    state = r.run_pass(work, adapter)
    _, expected = reference(r.executor, adapter).gradients(work.seqs)
    assert state.grads.shape == expected.shape
    assert (state.grads - expected).abs().max() < 1e-10


@pytest.mark.parametrize("tile", TILES[:3])
def test_without_key_value_gradients_of_later_tiles_it_fails(
    rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    backward = Attention.attend_backward

    def forgetful(self: Attention, *args: Any) -> torch.Tensor:
        *rest, k, v, mask, dk, dv = args
        own = slice(k.shape[1] - tile, dk.shape[1])
        all_dk, all_dv = torch.zeros_like(dk), torch.zeros_like(dv)
        dq = backward(self, *rest, k, v, mask, all_dk, all_dv)
        dk[:, own] += all_dk[:, own]
        dv[:, own] += all_dv[:, own]
        return dq

    monkeypatch.setattr(Attention, "attend_backward", forgetful)
    assert error(float64_rig(rig, tile), draw_tokens, random_adapter, reference) > 1e-6
