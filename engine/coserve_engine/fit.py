"""A non-negative linear fit that forgets, cheap enough to be updated in each iteration."""

from __future__ import annotations

from collections.abc import Iterable
from operator import mul

from coserve_engine.work import Features

WARM = 64
"""Samples after which the solution moves little, so that fewer sweeps do."""
HEAVIEST = 1e60
"""Weight of a sample beyond which all are made lighter, so that no sum overflows."""


class OnlineFit:
    """Least squares over `size` features with exponential forgetting and coefficients of at least zero.

    Samples weigh 1 / seconds^2, so that errors count relatively; the normal equations are solved by coordinate
    descent that starts from the last solution.
    """

    def __init__(self, size: int, forgetting: float = 0.99) -> None:
        self._growth, self._weight = 1.0 / forgetting, 1.0
        self._a = [[1e-9 if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._gradient = [0.0] * size
        """b - A c, kept up rather than b: what does not move then costs nothing."""
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
        self._weight *= self._growth  # instead of making all sums smaller
        if self._weight > HEAVIEST:
            self._lighten()
        alike: dict[Features, tuple[float, float]] = {}
        for x, seconds in samples:
            self.samples += 1
            weight = self._weight / max(seconds, 1e-4) ** 2
            weights, weighted = alike.get(x, (0.0, 0.0))
            alike[x] = weights + weight, weighted + weight * seconds
        a, gradient = self._a, self._gradient
        for x, (weights, weighted) in alike.items():
            error = weighted - weights * self.predict(x)
            seen = [(i, value) for i, value in enumerate(x) if value]
            for i, value in seen:
                row, scaled = a[i], weights * value
                for j, other in seen:
                    row[j] += scaled * other
                gradient[i] += error * value
        self._solve(2 if self.warm else 8)

    def _lighten(self) -> None:
        self._a = [[value / self._weight for value in row] for row in self._a]
        self._gradient = [value / self._weight for value in self._gradient]
        self._weight = 1.0

    def _solve(self, sweeps: int) -> None:
        gradient, c, least = self._gradient, self.coefficients, 1e-12 * self._weight
        for _ in range(sweeps):
            for i, row in enumerate(self._a):
                if row[i] > least:
                    step = max(-c[i], gradient[i] / row[i])
                    if step:
                        c[i] += step
                        for j, other in enumerate(row):
                            gradient[j] -= step * other
