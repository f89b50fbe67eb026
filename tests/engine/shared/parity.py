"""What is compared of a table of kernels: logits of a prompt and of decode, and a pass's gradient, by how far they are
from what they should be.
"""

from __future__ import annotations

import torch
from engine_rig import Rig
from random_models import Adapter, Computed, draw_adapter, draw_sequence

from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState

BOUND = 1.5
"""Times the error of whoever else computes in bfloat16."""
LENGTH, CHUNK = 140, 70


def rounded_adapter(executor: Executor) -> Adapter:
    """A float32 adapter of values that bfloat16 holds, to be computed with in bfloat16."""
    drawn = draw_adapter(executor, seed=5)
    return Computed(drawn.layout, drawn.flat.bfloat16().float())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what was expected, in float64 on a CPU."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


def logits(r: Rig, adapter: Adapter, tokens: tuple[int, ...], chunk: int = CHUNK) -> torch.Tensor:
    """[LENGTH - chunk + 1, vocab]: of a chunk's last row and of all that are decoded after it."""
    rows = r.rows(r.add(tokens, adapter), [chunk] + [1] * (LENGTH - chunk))
    found = torch.stack([rows[at] for at in range(chunk - 1, LENGTH)])
    assert found.dtype is r.executor.dtypes.accumulate
    return found


def samples() -> tuple[TrainSeq, ...]:
    """Several at once, none of which ends with a tile."""
    return tuple(TrainSeq(n, draw_sequence(n, size), (0.01,) * size) for n, size in enumerate((83, 5, 140)))


def trained(r: Rig, adapter: Adapter, seqs: tuple[TrainSeq, ...]) -> PassState:
    """A pass over `seqs`, cut into windows and units, with its gradient and loss."""
    work = Pass(1, "job", 0, 0, seqs)
    state = r.run_pass(work, adapter, window=lambda: 2, unit=lambda: 2, want_logprobs=True)
    assert state.grads.dtype is r.executor.dtypes.lora
    return state
