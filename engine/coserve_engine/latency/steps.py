"""What two lines leave of the time of a number of rows: a device computes in waves of tiles, so that 1,088 rows take a
third longer than 1,024. Which numbers are dear is learnt one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

DOUBT = 4.0
"""Measurements that a number needs before half of what they say is believed."""
MEMORY = 64.0
"""A mean is of so many measurements at most, so that it follows a change."""
MOST = math.log(1.5)


class Steps:
    """For each number of launched rows the ratio of its seconds to those of the lines."""

    def __init__(self) -> None:
        self._means: dict[float, tuple[float, float]] = {}
        """Rows -> (measurements, mean of the log of their ratios)."""
        self._factors: dict[float, float] = {}

    def factor(self, rows: float) -> float:
        """How many times as long as the lines say `rows` take."""
        return self._factors.get(rows, 1.0)

    def learn(self, rows: float, ratios: Iterable[float]) -> None:
        """`rows` took so many times what the lines say."""
        count, mean = self._means.get(rows, (0.0, 0.0))
        for ratio in ratios:
            count = min(MEMORY, count + 1)
            mean += (min(MOST, max(-MOST, math.log(ratio))) - mean) / count
        self._means[rows] = count, mean
        self._factors[rows] = math.exp(mean * count / (count + DOUBT))
