"""A bound on the error of predictions that keeps its promise: a share `miss_rate` of what follows may exceed it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

QUANTILE = 0.99
YOUNG = 256
"""Ratios below which the empirical quantile is a maximum, and one outlier would decide it."""


class _Ranked:
    """The last `size` values, also in order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: deque[float] = deque()
        self.ranked: list[float] = []

    def add(self, value: float) -> None:
        """Take one more in the place of the oldest."""
        recent, ranked = self._recent, self.ranked
        if len(recent) == self._size:
            del ranked[bisect_left(ranked, recent.popleft())]
        recent.append(value)
        insort(ranked, value)


class ErrorBound:
    """An upper bound on actual / predicted.

    A quantile of the last ratios, moved by adaptive conformal inference (Gibbs, Candes: Adaptive Conformal Inference
    Under Distribution Shift, 2021): up by step * (1 - miss_rate) at a miss, down by step * miss_rate otherwise, which
    makes the share of misses tend to `miss_rate` however the errors are distributed. A stall counts as one miss and
    one ratio, whatever its length and however much of an iteration it slows.
    """

    def __init__(self, miss_rate: float, window: int = 512, step: float = 0.02, ceiling: float = 3.0) -> None:
        self._miss_rate, self._step, self._ceiling = miss_rate, step, ceiling
        self._last = _Ranked(window)
        self._shift = 0.06
        self.ratio = 1.5
        """Actual / predicted stays below; 1.02 at least."""

    def update(self, ratios: Sequence[float]) -> None:
        """Learn actual / predicted of what one iteration planned under the bound."""
        highest, bound = max(ratios), self.ratio
        missed = highest > bound
        for ratio in ratios:
            if ratio <= bound:
                self._last.add(ratio)
        if missed:
            self._last.add(highest)
        shift = self._shift + self._step * (missed - len(ratios) * self._miss_rate)
        self._shift = shift = shift if -0.05 < shift < 1.0 else min(1.0, max(-0.05, shift))
        bound = self._quantile() + shift
        self.ratio = bound if 1.02 < bound < self._ceiling else min(self._ceiling, max(1.02, bound))

    @property
    def spread(self) -> float:
        """Half of what the middle two thirds of the last ratios span: their standard deviation without outliers."""
        ranked, count = self._last.ranked, len(self._last.ranked)
        return (ranked[int(0.84 * count)] - ranked[int(0.16 * count)]) / 2 if count else 0.0

    def _quantile(self) -> float:
        ranked, count = self._last.ranked, len(self._last.ranked)
        top = ranked[int(QUANTILE * count)]
        if count >= YOUNG:
            return top
        if count < 8:
            return max(1.4, min(2.0, ranked[-1]))
        middle = ranked[count // 2]
        return min(top, middle + 6 * (ranked[int(0.84 * count)] - middle) + 0.05)


class Highest:
    """A quantile of the last seconds of something that depends on nothing, 1 ms before the first."""

    def __init__(self, quantile: float = 0.98, window: int = 128) -> None:
        self._quantile = quantile
        self._last = _Ranked(window)

    @property
    def seconds(self) -> float:
        ranked = self._last.ranked
        return ranked[int(self._quantile * (len(ranked) - 1))] if ranked else 1e-3

    @property
    def median_s(self) -> float:
        """What it mostly takes."""
        ranked = self._last.ranked
        return ranked[len(ranked) // 2] if ranked else 1e-3

    def update(self, seconds: float) -> None:
        """Learn one measurement."""
        self._last.add(seconds)
