"""The same bits at the widths of a real small model (SmolLM2-135M's, two layers), where BLAS blocks its products."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from coserve_engine.messages import Pass, TrainSeq

LENGTH = 200


@pytest.fixture(scope="module")
def wide(rig: Any, model_path: Any) -> Any:
    return rig(model_path("smol"), kv_cache_bytes=64 << 20)


@pytest.fixture(scope="module")
def one_by_one(wide: Any, draw_tokens: Any, random_adapter: Any) -> dict[int, torch.Tensor]:
    found = wide.rows(wide.add(draw_tokens(5, LENGTH), random_adapter(wide.executor, rank=6)), [1] * LENGTH)
    wide.clear()
    return found


@pytest.mark.parametrize("seed", range(6))
def test_logits_do_not_depend_on_chunks_or_company(
    wide: Any, draw_tokens: Any, random_adapter: Any, one_by_one: Any, seed: int
) -> None:
    source = random.Random(seed)
    sizes: list[int] = []
    while (left := LENGTH - sum(sizes)) > 0:
        sizes.append(min(left, source.choice((1, 3, source.randint(1, 150)))))
    other = random_adapter(wide.executor, rank=16, seed=1)
    length = source.randint(100, 300)
    state = wide.open(Pass(1, "job", 0, 0, (TrainSeq(0, draw_tokens(1, length), (0.01,) * length),)), other)

    def beside() -> list[Any]:
        if not state.forward_done:
            return [wide.window(state, source.randint(1, 3))]
        if not state.done:
            wide.executor.backward(wide.unit(state, source.randint(1, 4)))
        return []

    adapter = random_adapter(wide.executor, rank=6)
    found = wide.rows(wide.add(draw_tokens(5, LENGTH), adapter), sizes, beside=beside)
    wide.executor.close_pass(1)
    wide.clear()
    assert all(torch.equal(row, one_by_one[at]) for at, row in found.items())


def test_gradients_do_not_depend_on_windows_or_units(wide: Any, draw_tokens: Any, random_adapter: Any) -> None:
    adapter, lengths = random_adapter(wide.executor, rank=16), (300, 45)
    seqs = tuple(TrainSeq(n, draw_tokens(n, length), (0.01,) * length) for n, length in enumerate(lengths))
    work = Pass(1, "job", 0, 0, seqs)
    expected = wide.run_pass(work, adapter)
    for seed in range(4):
        source = random.Random(seed)
        state = wide.run_pass(
            work,
            adapter,
            window=lambda source=source: source.randint(1, 6),
            unit=lambda source=source: source.randint(1, 4),
        )
        assert torch.equal(state.grads, expected.grads)
        assert state.loss_sum() == expected.loss_sum()
