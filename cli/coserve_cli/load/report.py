"""What a run's clients saw: percentiles, throughput and goodput."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coserve_cli.load.sender import Sample

PERCENTS = (50, 90, 99)


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed; None of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)] if ranked else None


@dataclass(frozen=True)
class Promise:
    """A request is in time if its first token is, and 99 % of the gaps between its tokens; a failed one never is."""

    ttft_ms: float
    tpot_ms: float

    def kept(self, sample: Sample) -> bool:
        if sample.error is not None or sample.ttft_s is None:
            return False
        return sample.ttft_s * 1000 <= self.ttft_ms and (percentile(sample.gaps_s, 99) or 0) * 1000 <= self.tpot_ms


@dataclass(frozen=True)
class Report:
    """Times in milliseconds by percent; TPOT is a request's mean, ITL each gap's."""

    requests: int
    failed: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_ms: dict[str, float | None]
    tpot_ms: dict[str, float | None]
    itl_ms: dict[str, float | None]
    e2e_ms: dict[str, float | None]
    promise_ms: dict[str, float]
    in_time_percent: float
    """Of all requests, those that failed included."""
    goodput_per_s: float
    """Requests in time, a second."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report(samples: Sequence[Sample], promise: Promise) -> Report:
    """The report of a run that has ended, or was broken off: what has not ended has failed."""
    done = [sample for sample in samples if sample.error is None and sample.ended_s]
    begun = min((sample.due_s for sample in samples), default=0.0)
    seconds = max([sample.ended_s for sample in samples] + [begun]) - begun
    kept = sum(promise.kept(sample) and bool(sample.ended_s) for sample in samples)
    errors = Counter(sample.error or "did not end" for sample in samples if sample.error or not sample.ended_s)
    tokens = sum(sample.tokens for sample in done)
    return Report(
        requests=len(samples),
        failed=len(samples) - len(done),
        errors=dict(errors.most_common(10)),
        seconds=seconds,
        prompt_tokens=sum(sample.prompt_tokens for sample in done),
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds if seconds else 0.0,
        ttft_ms=_percents([sample.ttft_s for sample in done if sample.ttft_s is not None]),
        tpot_ms=_percents([_tpot_s(sample) for sample in done if sample.tokens > 1]),
        itl_ms=_percents([gap for sample in done for gap in sample.gaps_s]),
        e2e_ms=_percents([sample.ended_s - sample.due_s for sample in done]),
        promise_ms={"ttft": promise.ttft_ms, "tpot": promise.tpot_ms},
        in_time_percent=100.0 * kept / len(samples) if samples else 0.0,
        goodput_per_s=kept / seconds if seconds else 0.0,
    )


def _tpot_s(sample: Sample) -> float:
    return (sample.token_times_s[-1] - sample.token_times_s[0]) / (sample.tokens - 1)


def _percents(seconds: Sequence[float]) -> dict[str, float | None]:
    values = {f"p{percent}": percentile(seconds, percent) for percent in PERCENTS}
    return {name: None if value is None else round(1000 * value, 3) for name, value in values.items()}
