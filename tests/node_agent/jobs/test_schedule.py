"""The learning rates are transformers' to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from coserve_agent.jobs.schedule import learning_rate


@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
@pytest.mark.parametrize("total", [1, 10, 23])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_rates_equal_those_of_get_scheduler(name: str, total: int, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(name, step, 2e-4, warmup, total) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="linear, cosine or constant"):
        learning_rate("polynomial", 1, 1e-4, 0, 10)
