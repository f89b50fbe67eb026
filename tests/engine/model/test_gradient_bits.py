"""In float32 a pass's gradient is the same bits however its windows and units were cut and whatever ran in between."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from coserve_engine.kernels.cpu import table
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.scheduler.plan import Kind, Segment

LENGTHS = (310, 70, 3, 129)


@pytest.fixture(scope="module")
def work(draw_tokens: Any) -> Pass:
    seqs = (TrainSeq(n, draw_tokens(n, length), (0.01,) * length) for n, length in enumerate(LENGTHS))
    return Pass(1, "job", 0, 0, tuple(seqs))


def gradient(rig: Any, adapter: Any, work: Pass, seed: int, between: Any = lambda: None) -> tuple[torch.Tensor, float]:
    source = random.Random(seed)
    state = rig.run_pass(
        work, adapter, window=lambda: source.randint(1, 9), unit=lambda: source.randint(1, 4), between=between
    )
    return state.grads, state.loss_sum()


@pytest.fixture(scope="module")
def shared(rig: Any) -> Any:
    return rig()


@pytest.fixture(scope="module")
def tile_by_tile(shared: Any, random_adapter: Any, work: Pass) -> tuple[torch.Tensor, float]:
    state = shared.run_pass(work, random_adapter(shared.executor, rank=6))
    return state.grads, state.loss_sum()


@pytest.mark.parametrize("seed", range(12))
def test_windows_and_units_leave_no_trace(
    shared: Any, random_adapter: Any, work: Pass, tile_by_tile: Any, seed: int
) -> None:
    grads, loss = gradient(shared, random_adapter(shared.executor, rank=6), work, seed)
    assert torch.equal(grads, tile_by_tile[0])
    assert loss == tile_by_tile[1]


@pytest.mark.parametrize("model", ("llama31", "mistral", "qwen2", "qwen3"))
def test_nor_on_other_architectures(rig: Any, model_path: Any, random_adapter: Any, work: Pass, model: str) -> None:
    r = rig(model_path(model))
    adapter = random_adapter(r.executor, rank=6)
    state = r.run_pass(work, adapter)
    for seed in range(3):
        grads, loss = gradient(r, adapter, work, seed)
        assert torch.equal(grads, state.grads)
        assert loss == state.loss_sum()


@pytest.mark.parametrize("seed", range(4))
def test_requests_and_other_passes_leave_no_trace(
    rig: Any, random_adapter: Any, draw_tokens: Any, work: Pass, tile_by_tile: Any, seed: int
) -> None:
    r, source = rig(), random.Random(seed)
    other_adapter = random_adapter(r.executor, rank=16, seed=3)
    slot = r.add(draw_tokens(9, 300), other_adapter)
    other = r.open(Pass(2, "other", 0, 0, (TrainSeq(0, draw_tokens(8, 200), (0.01,) * 200),)), other_adapter)

    def between() -> None:
        segments = [Segment(Kind.PREFILL, slot, 0, source.randint(1, 300))]
        if not other.forward_done:
            segments.append(r.window(other, source.randint(1, 3)))
        elif not other.done:
            r.executor.backward(r.unit(other, source.randint(1, 4)))
        r.forward(*segments)

    grads, loss = gradient(r, random_adapter(r.executor, rank=6), work, seed, between)
    assert torch.equal(grads, tile_by_tile[0])
    assert loss == tile_by_tile[1]


def test_sums_by_unit_break_it(
    shared: Any, random_adapter: Any, work: Pass, tile_by_tile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = table.linear_backward

    def whole(dy: torch.Tensor, x: torch.Tensor, *args: Any, need_dx: bool) -> torch.Tensor | None:
        return backward(dy, x, *args[:-2], ((0, x.shape[0]),), args[-1], need_dx=need_dx)

    monkeypatch.setattr(table, "linear_backward", whole)
    adapter = random_adapter(shared.executor, rank=6)
    found = [gradient(shared, adapter, work, seed)[0] for seed in range(4)]
    assert all(torch.allclose(grads, tile_by_tile[0], rtol=1e-3, atol=1e-5) for grads in found), "it is a gradient"
    assert any(not torch.equal(grads, found[0]) for grads in found[1:])
