"""A latency model of forwards and backward units, learned online, with a bound on its error.

A prediction is a linear fit of counts, which moves slowly, times the speed of the machine at the moment, which moves
within a dozen iterations: a neighbour that takes half the memory bandwidth slows everything alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul

from coserve_engine.latency.errorbound import ErrorBound, Highest
from coserve_engine.latency.fit import OnlineFit, Prior
from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.steps import Steps
from coserve_engine.latency.work import Features, ForwardWork, UnitWork

MISS_RATE = 5e-4
"""Share of forwards, and of units, that may take longer than their bound: together one iteration in a thousand."""
RARE_MISS = 1e-4
"""The same where a device has a knee: iterations are ten times as many there, and each is one of every request's."""
SPEED_GAIN = 0.15
LEAST_RATIO, MOST_RATIO = math.exp(-0.3), math.exp(0.3)
"""Actual / predicted counts for at least and at most so much where the speed learns from it."""
LESSON = 4
"""Iterations after which a fit that is warm learns from them all: what moves faster, the speed follows."""
OUTLIER = 2.0
"""A measurement counts for at most so many times its prediction, or one stall would bend the fit."""


class Predictor:
    """Seconds of one kind of work: a fit, the machine's speed, and the bound on what is left of the error."""

    def __init__(self, size: int, prior: Prior | None = None, regime: Regime | None = None) -> None:
        self._fit = OnlineFit(size, prior=prior)
        self._steps = None if regime is None else Steps()
        """Of the second feature, the rows that are launched."""
        self._miss_rate = MISS_RATE if regime is None else RARE_MISS
        self._new: list[tuple[Features, float]] = []
        """What the fit has not learnt yet, of the last `_iterations`."""
        self._iterations = 0
        self._log_speed = 0.0
        self.coefficients: Features = tuple(self._fit.coefficients)
        """Seconds for each feature, the speed in them."""
        self.forget_errors()

    def forget_errors(self) -> None:
        """Start the error bound anew."""
        self.error = ErrorBound(self._miss_rate)

    def seconds(self, x: Features) -> float:
        seconds = float(sum(map(mul, self.coefficients, x)))
        return seconds if self._steps is None else seconds * self._steps.factor(x[1])

    def learn(self, samples: Iterable[tuple[Features, Sequence[float]]]) -> None:
        """(features, seconds of each time) of one iteration. A time of nothing is left out: a pause hid it all."""
        known = [(x, seen) for x, times in samples if (seen := [seconds for seconds in times if seconds > 0.0])]
        if not known:
            return
        new, ratios, warm = self._new, [], self._fit.warm
        for x, times in known:
            predicted = self.seconds(x)
            most = OUTLIER * predicted if warm and predicted > 0 else math.inf
            believed = [seconds if seconds < most else most for seconds in times]
            if self._steps is not None:
                factor = self._steps.factor(x[1])
                if predicted > 0:
                    self._steps.learn(x[1], [factor * seconds / predicted for seconds in believed])
                believed = [seconds / factor for seconds in believed]
            new += [(x, seconds) for seconds in believed]
            if predicted > 0:
                ratios += [seconds / predicted for seconds in times]
        if ratios:
            self.error.update(ratios)
            if warm:
                # Towards 1 by itself: the fit catches up with a change that lasts.
                errors = [math.log(min(MOST_RATIO, max(LEAST_RATIO, ratio))) for ratio in ratios]
                self._log_speed = 0.995 * self._log_speed + SPEED_GAIN * sum(errors) / len(errors)
        self._iterations += 1
        if not warm or self._iterations == LESSON:
            self._fit.update(new, self._iterations)
            new.clear()
            self._iterations = 0
        speed = math.exp(self._log_speed)
        self.coefficients = tuple([speed * c for c in self._fit.coefficients])


class CostModel:
    """Predicts seconds. Planning only reads it; the engine tells it what came of each plan."""

    def __init__(self, regime: Regime | None = None) -> None:
        self.regime = regime
        """Where bytes decide and where operations do; None: one line is right, as on a CPU."""
        self._forward, self._unit, self._head = (Predictor(size, regime=regime) for size in (7, 4, 4))
        self._turnaround = Highest()

    def begin(
        self, forward: Prior, unit: Prior | None = None, head: Prior | None = None, regime: Regime | None = None
    ) -> None:
        """Forget all, and believe this until it is measured; units without a prior cost nothing until then. Priors are
        of one line's features, whatever the regime.
        """
        self.regime = regime
        if regime is not None:
            forward = regime.forward_prior(forward)
            unit, head = (prior and regime.unit_prior(prior) for prior in (unit, head))
        self._forward = Predictor(7, forward, regime)
        self._unit, self._head = Predictor(4, unit, regime), Predictor(4, head, regime)

    def forget_errors(self) -> None:
        """Start the error bounds anew: the errors of a fit that has just begun say nothing."""
        for predictor in (self._forward, self._unit, self._head):
            predictor.forget_errors()

    @property
    def coefficients(self) -> tuple[Features, Features, Features]:
        """Seconds for each feature (of the regime, where there is one) of forwards, units and head units, as of now."""
        return self._forward.coefficients, self._unit.coefficients, self._head.coefficients

    def forward_s(self, work: ForwardWork) -> float:
        """Seconds a forward is expected to take."""
        decode, prefill, finetune, calls, kv_rows, pairs = work
        if not (decode or prefill or finetune):
            return 0.0
        if self.regime is not None:
            return self._forward.seconds(self.regime.forward(work.features()))
        a, b, c, d, e, f, g = self._forward.coefficients
        # Its features times the coefficients, written out because a plan asks a dozen times.
        return a + b * decode + c * prefill + d * finetune + e * calls + f * (kv_rows / 1e3) + g * (pairs / 1e5)

    @property
    def forward_ratio(self) -> float:
        """Bound of a forward / its prediction."""
        return self._forward.error.ratio

    @property
    def forward_noise(self) -> float:
        """Standard deviation of actual / predicted of the last forwards, without outliers."""
        return self._forward.error.spread

    def forward_bound_s(self, work: ForwardWork) -> float:
        """Seconds a forward stays below in all but MISS_RATE of cases."""
        return self.forward_s(work) * self.forward_ratio

    def unit_s(self, work: UnitWork) -> float:
        """Seconds a unit is expected to take."""
        head, rows, tiles, pairs = work
        if self.regime is not None:
            return (self._head if head else self._unit).seconds(self.regime.unit(work.features()))
        a, b, c, d = (self._head if head else self._unit).coefficients
        return a + b * rows + c * tiles + d * (pairs / 1e5)

    def unit_ratio(self, *, head: bool) -> float:
        """Bound of a unit / its prediction."""
        return (self._head if head else self._unit).error.ratio

    def unit_bound_s(self, work: UnitWork) -> float:
        """Seconds a unit stays below in all but MISS_RATE of cases."""
        return self.unit_s(work) * self.unit_ratio(head=work.head)

    @property
    def turnaround_s(self) -> float:
        """Seconds that nearly always suffice from the end of one iteration to the plan of the next."""
        return self._turnaround.seconds

    @property
    def median_turnaround_s(self) -> float:
        """Seconds that it mostly takes."""
        return self._turnaround.median_s

    def observe(
        self,
        forward: ForwardWork,
        forward_s: float,
        units: Sequence[tuple[UnitWork, float]],
        turnaround_s: float | None = None,
    ) -> None:
        """Learn from an outcome."""
        regime = self.regime
        if not forward.empty:
            x = forward.features() if regime is None else regime.forward(forward.features())
            self._forward.learn([(x, (forward_s,))])
        if units:
            times: dict[UnitWork, list[float]] = {}
            for unit, seconds in units:
                times.setdefault(unit, []).append(seconds)
            for predictor, head in ((self._unit, False), (self._head, True)):
                samples = [
                    (unit.features() if regime is None else regime.unit(unit.features()), seconds)
                    for unit, seconds in times.items()
                    if unit.head is head
                ]
                if samples:
                    predictor.learn(samples)
        if turnaround_s is not None:
            self._turnaround.update(turnaround_s)
