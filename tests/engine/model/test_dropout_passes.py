"""Dropout in a pass: the gradient is PEFT's under the same masks, and the same bits whatever the windows and units."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.config import LINEARS
from coserve_engine.kernels import dropout as dropout_module
from coserve_engine.kernels import lora
from coserve_engine.kernels.dropout import dropout, row_keys
from coserve_engine.messages import Pass, PassMode, TrainSeq
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.lora import LoraLayout

P = 0.3


def with_dropout(executor: Any, adapter: Any) -> Any:
    return replace(adapter, layout=LoraLayout(executor.model, replace(adapter.layout.spec, dropout=P)))


def sequences(draw_tokens: Any, epoch: int = 2) -> tuple[TrainSeq, ...]:
    """Two of one line, as its turns, and one of another."""
    lines = ((40, 0, 83), (40, 3, 5), (41, 0, 190))
    return tuple(
        TrainSeq(uid, draw_tokens(n, length), (0.02,) * length, epoch, turn=turn)
        for n, (uid, turn, length) in enumerate(lines)
    )


class Masked(torch.nn.Module):
    """Our mask in the place of PEFT's dropout; `seq` is the sequence that goes through."""

    def __init__(self, layer: int, name: str, at: dict[str, TrainSeq]) -> None:
        super().__init__()
        self._layer, self._name, self._at = layer, name, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seq = self._at["seq"]
        keys = row_keys(0, seq.uid, seq.epoch, torch.arange(x.shape[1]), seq.turn)
        return dropout(x[0], keys, self._layer, self._name, P)[None]


def expected_gradient(model: Any, seqs: tuple[TrainSeq, ...]) -> torch.Tensor:
    """PEFT's, under our masks, one sequence at a time."""
    at: dict[str, TrainSeq] = {}
    for index, layer in enumerate(model.model.base_model.model.model.layers):
        for name in LINEARS:
            block = layer.mlp if name in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
            getattr(block, name).lora_dropout["default"] = Masked(index, name, at)
    total: torch.Tensor | None = None
    for seq in seqs:
        at["seq"] = seq
        model.model.zero_grad()
        _, flat = model.gradients((seq,))
        total = flat if total is None else total + flat
    assert total is not None
    return total


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("change", ("none", "epoch", "turn"))
def test_gradients_are_pefts_under_the_same_masks(
    rig: Any, draw_tokens: Any, random_adapter: Any, reference: Any, change: str
) -> None:
    """Another epoch, or turn, draws other masks: then the gradient differs."""
    r = rig(dtype="float64")
    adapter = with_dropout(r.executor, random_adapter(r.executor))
    state = r.run_pass(Pass(1, "job", 0, 0, sequences(draw_tokens)), adapter)
    seqs = sequences(draw_tokens, epoch=3 if change == "epoch" else 2)
    if change == "turn":
        seqs = tuple(replace(seq, turn=seq.turn + 1) for seq in seqs)
    error = (state.grads - expected_gradient(reference(r.executor, adapter), seqs)).abs().max()
    assert (error < 1e-10) if change == "none" else (error > 1e-4)


def gradient(r: Any, adapter: Any, work: Pass, seed: int) -> torch.Tensor:
    source = random.Random(seed)
    found: torch.Tensor = r.run_pass(
        work, adapter, window=lambda: source.randint(1, 5), unit=lambda: source.randint(1, 4)
    ).grads
    return found


@pytest.fixture
def work(draw_tokens: Any) -> Pass:
    return Pass(1, "job", 0, 0, sequences(draw_tokens))


def test_windows_and_units_leave_no_trace(rig: Any, random_adapter: Any, work: Pass) -> None:
    r = rig()
    adapter = with_dropout(r.executor, random_adapter(r.executor))
    first = gradient(r, adapter, work, 0)
    assert all(torch.equal(first, gradient(r, adapter, work, seed)) for seed in range(1, 5))
    assert not torch.equal(first, gradient(r, random_adapter(r.executor), work, 0)), "something is dropped"


def test_masks_from_a_generator_would_leave_one(
    rig: Any, random_adapter: Any, work: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x * (torch.rand(x.shape, generator=generator) >= P) / (1 - P)

    monkeypatch.setattr(lora, "dropout", drawn)
    r = rig()
    adapter = with_dropout(r.executor, random_adapter(r.executor))
    assert not torch.equal(gradient(r, adapter, work, 0), gradient(r, adapter, work, 1))


def test_nothing_is_dropped_in_evaluation_or_of_requests(
    rig: Any, random_adapter: Any, draw_tokens: Any, work: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rig()
    plain = random_adapter(r.executor)
    adapter = with_dropout(r.executor, plain)
    evaluated = replace(work, mode=PassMode.EVAL)
    assert r.run_pass(evaluated, adapter).loss_sum() == r.run_pass(replace(evaluated, id=2), plain).loss_sum()
    prompt = draw_tokens(7, 90)
    alone = r.forward(Segment(Kind.PREFILL, r.add(prompt, adapter), 0, 90, sample=True))
    slot, state = r.add(prompt, adapter), r.open(replace(work, id=3), adapter)
    mixed = r.forward(Segment(Kind.PREFILL, slot, 0, 90, sample=True), r.window(state, 3))
    assert torch.equal(*(next(iter(rows.values())) for rows in (alone, mixed)))
    with monkeypatch.context() as patch:
        patch.setattr(dropout_module, "dropout_mask", None)
        r.run_pass(replace(evaluated, id=4), adapter)
