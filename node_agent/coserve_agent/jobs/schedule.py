"""Learning rate schedules, value for value those of transformers' `get_scheduler`."""

from __future__ import annotations

import math


def learning_rate(name: str, step: int, base: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (0-based: with warmup the first one has rate 0, as in the Trainer).

    Args:
        name: linear, cosine or constant (`constant_with_warmup` there, if there are warmup steps).
    """
    if step < warmup_steps:
        return base * (float(step) / float(max(1, warmup_steps)))
    if name == "constant":
        return base
    span = float(max(1, total_steps - warmup_steps))
    if name == "linear":
        return base * max(0.0, float(total_steps - step) / span)
    if name == "cosine":
        progress = float(step - warmup_steps) / span
        return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
    raise ValueError(f"schedule is {name!r}; use linear, cosine or constant")
