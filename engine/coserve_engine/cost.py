"""A latency model of forwards and backward units, fitted online, with a quantile bound on its error.

Times are linear in a few counts: the features of each kind of work. The fit is least squares with exponential
forgetting and non-negative coefficients, by coordinate descent on the normal equations; the bound is an empirical
quantile of actual / predicted.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

Features = tuple[float, ...]


class OnlineFit:
    """Non-negative linear model of `size` features, updated sample by sample."""

    def __init__(self, size: int, forgetting: float = 0.99) -> None:
        self._forgetting = forgetting
        self._a = [[1e-9 if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._b = [0.0] * size
        self.coefficients = [0.0] * size

    def predict(self, x: Features) -> float:
        return sum(c * f for c, f in zip(self.coefficients, x, strict=True))

    def update(self, x: Features, seconds: float) -> None:
        """Learn that `x` took `seconds`; samples are weighted by 1 / seconds^2, so that errors count relatively."""
        weight = 1.0 / max(seconds, 1e-4) ** 2
        for i, xi in enumerate(x):
            row = self._a[i]
            for j, xj in enumerate(x):
                row[j] = row[j] * self._forgetting + weight * xi * xj
            self._b[i] = self._b[i] * self._forgetting + weight * xi * seconds
        c = self.coefficients
        for _ in range(8):
            for i, row in enumerate(self._a):
                if row[i] > 1e-12:
                    rest = sum(row[j] * c[j] for j in range(len(c)) if j != i)
                    c[i] = max(0.0, (self._b[i] - rest) / row[i])


class QuantileBound:
    """The `quantile` of the last `window` ratios actual / predicted, never below 1."""

    def __init__(self, quantile: float, window: int = 256) -> None:
        self._quantile = quantile
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []

    @property
    def ratio(self) -> float:
        if len(self._sorted) < 8:
            return 1.5
        return max(1.0, self._sorted[min(len(self._sorted) - 1, int(self._quantile * len(self._sorted)))])

    def update(self, ratio: float) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._sorted.pop(bisect.bisect_left(self._sorted, self._recent[0]))
        self._recent.append(ratio)
        bisect.insort(self._sorted, ratio)


@dataclass(frozen=True, slots=True)
class ForwardWork:
    """What a forward's time depends on. `kv_rows`: keys gathered by all attention calls; `pairs`: query-key pairs."""

    decode: int = 0
    prefill: int = 0
    finetune: int = 0
    calls: int = 0
    kv_rows: int = 0
    pairs: int = 0

    def plus(self, other: ForwardWork) -> ForwardWork:
        return ForwardWork(
            self.decode + other.decode,
            self.prefill + other.prefill,
            self.finetune + other.finetune,
            self.calls + other.calls,
            self.kv_rows + other.kv_rows,
            self.pairs + other.pairs,
        )

    @property
    def empty(self) -> bool:
        return self.decode + self.prefill + self.finetune == 0

    def features(self) -> Features:
        return (1.0, self.decode, self.prefill, self.finetune, self.calls, self.kv_rows / 1e3, self.pairs / 1e5)


@dataclass(frozen=True, slots=True)
class UnitWork:
    """What a backward unit's time depends on; a head unit has no pairs."""

    head: bool
    rows: int
    tiles: int
    pairs: int

    def features(self) -> Features:
        return (1.0, self.rows, self.tiles, self.pairs / 1e5)


class CostModel:
    """Predicts seconds. Planning only reads it; the engine tells it what came of each plan."""

    def __init__(self, quantile: float = 0.99) -> None:
        self._forward = OnlineFit(7)
        self._units = {False: OnlineFit(4), True: OnlineFit(4)}
        self._quantile = quantile
        self.forget_errors()

    def forget_errors(self) -> None:
        """Start the error bounds anew: the errors of a fit that has just begun say nothing."""
        self._forward_bound = QuantileBound(self._quantile)
        self._unit_bound = QuantileBound(0.9)

    def forward_s(self, work: ForwardWork) -> float:
        """Seconds a forward is expected to take."""
        return 0.0 if work.empty else self._forward.predict(work.features())

    def forward_bound_s(self, work: ForwardWork) -> float:
        """Seconds a forward stays below in nearly all cases."""
        return self.forward_s(work) * self._forward_bound.ratio

    def unit_bound_s(self, work: UnitWork) -> float:
        """Seconds a unit stays below in most cases."""
        return self._units[work.head].predict(work.features()) * self._unit_bound.ratio

    def observe(self, forward: ForwardWork, forward_s: float, units: Sequence[tuple[UnitWork, float]]) -> None:
        """Learn from an outcome."""
        if not forward.empty:
            predicted = self.forward_s(forward)
            if predicted > 0:
                self._forward_bound.update(forward_s / predicted)
            self._forward.update(forward.features(), forward_s)
        for work, seconds in units:
            fit = self._units[work.head]
            predicted = fit.predict(work.features())
            if predicted > 0:
                self._unit_bound.update(seconds / predicted)
            fit.update(work.features(), seconds)
