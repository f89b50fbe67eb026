"""Means with 95 % confidence intervals over paired runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom."""


class Mean(NamedTuple):
    """A mean, and how far its interval reaches to either side (nan: of a single value)."""

    value: float
    within: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.within:.1f}" if self.within == self.within else f"{self.value:.1f}"


def mean(values: Sequence[float]) -> Mean:
    """Of one value a run; runs are independent, so of pairs give the differences or ratios."""
    count = len(values)
    if count < 2:
        return Mean(values[0], float("nan"))
    return Mean(statistics.mean(values), STUDENT[min(count, 10) - 2] * statistics.stdev(values) / count**0.5)
