"""A non-negative linear fit that forgets, cheap enough to be updated in each iteration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import mul

from coserve_engine.latency.work import Features

WIDTH = 7
"""Features at most: what is done to a row of numbers is written out for so many, which takes 0.6 of a loop's time."""
WARM = 64
"""Samples after which the solution moves little, so that fewer sweeps do."""
HEAVIEST = 1e60
"""Weight of a sample beyond which all are made lighter, so that no sum overflows."""

PRIOR_WEIGHT = 0.01
"""A made-up measurement of a prior counts for so much of a real one."""

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prior:
    """Where a fit begins.

    Args:
        coefficients: seconds for each feature.
        typical: how much of each feature a common piece of work has.
    """

    coefficients: Features
    typical: Features

    @property
    def typical_s(self) -> float:
        """Seconds of a common piece of work."""
        return self.seconds(self.typical)

    def seconds(self, x: Features) -> float:
        """Seconds for the features `x`."""
        return float(sum(map(mul, self.coefficients, x)))

    def scaled(self, factors: Sequence[float]) -> Prior:
        """Each coefficient times its factor."""
        return Prior(tuple(map(mul, self.coefficients, factors)), self.typical)


class OnlineFit:
    """Least squares over `size` features, WIDTH at most, with exponential forgetting and coefficients of at least zero.

    Samples weigh 1 / seconds^2, so that errors count relatively; the normal equations are solved by coordinate
    descent that starts from the last solution.

    A prior is a made-up measurement of each feature alone, in its typical number, whose error counts in a typical
    piece of work: it decides what was never measured or never apart, and fades like all the others.
    """

    def __init__(self, size: int, forgetting: float = 0.99, prior: Prior | None = None) -> None:
        self._growth, self._weight = 1.0 / forgetting, 1.0
        own = [1e-9] * size
        if prior is not None and prior.typical_s > 0:
            own = [max(1e-9, PRIOR_WEIGHT * (count / prior.typical_s) ** 2) for count in prior.typical]
        self._rows = [_wide(own[i] if i == j else 0.0 for j in range(size)) for i in range(size)]
        self._gradient = _wide(())
        """b - A c, kept up rather than b: what does not move then costs nothing."""
        self.samples = 0
        self.coefficients = [0.0] * size if prior is None else list(prior.coefficients)

    @property
    def warm(self) -> bool:
        """Whether enough is known to call a measurement an outlier."""
        return self.samples > WARM

    def predict(self, x: Features) -> float:
        """Seconds for the features `x`."""
        return float(sum(map(mul, self.coefficients, x)))

    def update(self, samples: Sequence[tuple[Features, float]], iterations: int = 1) -> None:
        """Learn from (features, seconds) of so many iterations; what was known before fades as often."""
        self._weight *= self._growth**iterations  # instead of making all sums smaller
        if self._weight > HEAVIEST:
            self._lighten()
        self.samples += len(samples)
        alike: dict[Features, tuple[float, float]] = {}
        for x, seconds in samples:
            weight = self._weight / (seconds if seconds > 1e-4 else 1e-4) ** 2
            weights, weighted = alike.get(x, (0.0, 0.0))
            alike[x] = weights + weight, weighted + weight * seconds
        for x, (weights, weighted) in alike.items():
            self._add(x, weights, weighted - weights * self.predict(x))
        self._solve(2 if self.warm else 8)

    def _lighten(self) -> None:
        self._rows = [_wide(value / self._weight for value in row) for row in self._rows]
        self._gradient = _wide(value / self._weight for value in self._gradient)
        self._weight = 1.0

    def _add(self, x: Features, weights: float, error: float) -> None:
        """Add `weights` times the outer product of `x` with itself, and `error` times `x` to the gradient."""
        rows, (x0, x1, x2, x3, x4, x5, x6) = self._rows, _wide(x)
        for i, value in enumerate(x):
            if value:
                s = weights * value
                a, b, c, d, e, f, g = rows[i]
                rows[i] = a + s * x0, b + s * x1, c + s * x2, d + s * x3, e + s * x4, f + s * x5, g + s * x6
        s, (a, b, c, d, e, f, g) = error, self._gradient
        self._gradient = a + s * x0, b + s * x1, c + s * x2, d + s * x3, e + s * x4, f + s * x5, g + s * x6

    def _solve(self, sweeps: int) -> None:
        gradient, found, least = self._gradient, self.coefficients, 1e-12 * self._weight
        for _ in range(sweeps):
            for i, row in enumerate(self._rows):
                own = row[i]
                if own > least:
                    s = gradient[i] / own
                    if s < -found[i]:
                        s = -found[i]
                    if s:
                        found[i] += s
                        a, b, c, d, e, f, g = gradient
                        x0, x1, x2, x3, x4, x5, x6 = row
                        gradient = a - s * x0, b - s * x1, c - s * x2, d - s * x3, e - s * x4, f - s * x5, g - s * x6
        self._gradient = gradient


def _wide(values: Iterable[float]) -> Row:
    """`values` as a row, zeros behind them."""
    row = tuple(values)
    return row + (0.0,) * (WIDTH - len(row))
