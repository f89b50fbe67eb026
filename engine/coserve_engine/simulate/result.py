"""What users saw in a run, and what finetuning got."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from coserve_engine.messages import IterationDone


@dataclass(slots=True)
class RequestTimes:
    """A request's arrival, the time to its first token, and the gaps between its tokens, in seconds."""

    arrival_s: float
    first_s: float = math.inf
    gaps_s: list[float] = field(default_factory=list)

    def strict(self, ttft_s: float, tpot_s: float) -> bool:
        """First token in time, and the P99 of the gaps: at most one in a hundred is late."""
        return self.first_s <= ttft_s and sum(gap > tpot_s for gap in self.gaps_s) <= len(self.gaps_s) // 100

    def by_mean(self, ttft_s: float, tpot_s: float) -> bool:
        """First token in time, and the mean gap (FlexLLM's measure, which hides stalls)."""
        return self.first_s <= ttft_s and sum(self.gaps_s) <= tpot_s * len(self.gaps_s)


@dataclass(slots=True)
class Result:
    """A finished run."""

    ttft_s: float
    tpot_s: float
    requests: list[RequestTimes] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)
    """Percent, a report each 250 ms."""
    iterations: int = 0
    over_bound: int = 0
    errors: float = 0.0
    """Sum of |predicted / actual - 1|."""
    unit_wait_s: float = 0.0
    """The longest that a request waited for units before the first forward that was planned after it came."""
    longest_unit_s: float = 0.0
    seconds: float = 0.0
    finetune_tokens: float = 0.0

    def iteration(self, done: IterationDone) -> None:
        """Count an iteration."""
        self.iterations += 1
        self.over_bound += done.started_s + done.duration_s - done.paused_s > done.until_s
        self.errors += abs(done.predicted_s / done.duration_s - 1.0)

    @property
    def strict_percent(self) -> float:
        return self._share([r.strict(self.ttft_s, self.tpot_s) for r in self.requests])

    @property
    def mean_percent(self) -> float:
        return self._share([r.by_mean(self.ttft_s, self.tpot_s) for r in self.requests])

    @property
    def over_percent(self) -> float:
        """Iterations that ended after their bound, but for pauses."""
        return 100.0 * self.over_bound / max(1, self.iterations)

    @property
    def error_percent(self) -> float:
        """Mean absolute error of the predicted length of an iteration (MAPE)."""
        return 100.0 * self.errors / max(1, self.iterations)

    def ttft_ms(self, percent: float) -> float:
        """A percentile of the times to first token."""
        return self._ranked_ms([r.first_s for r in self.requests], percent)

    def tpot_ms(self, percent: float) -> float:
        """A percentile, over requests, of the mean gap of each (vLLM's benchmark and LLMStation call it TPOT)."""
        return self._ranked_ms([sum(r.gaps_s) / len(r.gaps_s) for r in self.requests if r.gaps_s], percent)

    @property
    def finetune_tokens_per_s(self) -> float:
        return self.finetune_tokens / self.seconds if self.seconds else 0.0

    def gap_ms(self, percent: float) -> float:
        """A percentile of all gaps between tokens (nearest rank)."""
        return self._ranked_ms([gap for r in self.requests for gap in r.gaps_s], percent)

    @staticmethod
    def _ranked_ms(seconds: list[float], percent: float) -> float:
        ranked = sorted(seconds)
        return 1e3 * ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)] if ranked else math.nan

    @staticmethod
    def _share(kept: list[bool]) -> float:
        return 100.0 * sum(kept) / len(kept) if kept else math.nan
