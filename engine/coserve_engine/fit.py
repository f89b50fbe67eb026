"""A non-negative linear fit that forgets, cheap enough to be updated in each iteration."""

from __future__ import annotations

from collections.abc import Iterable
from operator import mul

from coserve_engine.work import Features

WARM = 64
"""Samples after which the solution moves little, so that fewer sweeps do."""


class OnlineFit:
    """Least squares over `size` features with exponential forgetting and coefficients of at least zero.

    Samples weigh 1 / seconds^2, so that errors count relatively; the normal equations are solved by coordinate
    descent that starts from the last solution.
    """

    def __init__(self, size: int, forgetting: float = 0.99) -> None:
        self._forgetting = forgetting
        self._a = [[1e-9 if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._b = [0.0] * size
        self.samples = 0
        self.coefficients = [0.0] * size

    @property
    def warm(self) -> bool:
        """Whether enough is known to call a measurement an outlier."""
        return self.samples > WARM

    def predict(self, x: Features) -> float:
        """Seconds for the features `x`."""
        return float(sum(map(mul, self.coefficients, x)))

    def update(self, samples: Iterable[tuple[Features, float]]) -> None:
        """Learn from (features, seconds) of one iteration; what was known before fades once."""
        a, b, keep = self._a, self._b, self._forgetting
        size = len(b)
        for i in range(size):
            a[i] = [value * keep for value in a[i]]
            b[i] *= keep
        for x, seconds in samples:
            self.samples += 1
            weight = 1.0 / max(seconds, 1e-4) ** 2
            for i in range(size):
                if x[i]:
                    scaled, row = weight * x[i], a[i]
                    for j in range(size):
                        row[j] += scaled * x[j]
                    b[i] += scaled * seconds
        self._solve(2 if self.warm else 8)

    def _solve(self, sweeps: int) -> None:
        c = self.coefficients
        for _ in range(sweeps):
            for i, row in enumerate(self._a):
                if row[i] > 1e-12:
                    c[i] = max(0.0, c[i] + (self._b[i] - sum(map(mul, row, c))) / row[i])
