"""From a recorded arrival trace to the demo's schedule: lengths scaled, arrivals stretched to a rate, one burst."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Recorded:
    """One request as it was recorded: seconds since the first, tokens of prompt and answer."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Scaling:
    """How the recording is fitted to a small model on a small machine; every number is printed with the result.

    Args:
        skip_s: where in the recording the replay begins; its first minute is sparser than the rest.
        seconds: length of the replay.
        rate: mean requests per second outside the burst.
        burst_at_s, burst_s, burst_factor: from burst_at_s on, for burst_s, arrivals come burst_factor times as fast.
        prompt_divisor, output_divisor: tokens are divided by these.
        context: requests whose scaled prompt and output together are longer are left out.
    """

    skip_s: float = 60.0
    seconds: float = 120.0
    rate: float = 2.0
    burst_at_s: float = 60.0
    burst_s: float = 12.0
    burst_factor: float = 4.0
    prompt_divisor: int = 8
    output_divisor: int = 8
    context: int = 512


@dataclass(frozen=True)
class Replay:
    """What is sent when, and the share of recorded requests that was left out."""

    arrivals: tuple[Recorded, ...]
    left_out_percent: float


def read_trace(path: Path) -> tuple[Recorded, ...]:
    """Read columns TIMESTAMP, ContextTokens, GeneratedTokens; raises ValueError naming the line that does not read."""
    rows: list[Recorded] = []
    first: datetime | None = None
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                first = first or at
                tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a row of the trace: {error!r}") from error
            rows.append(Recorded((at - first).total_seconds(), *tokens))
    return tuple(rows)


def fit(recorded: tuple[Recorded, ...], scaling: Scaling) -> Replay:
    """Stretch the gaps between consecutive recorded requests so that the mean rate outside the burst is
    `scaling.rate`.
    """
    recorded = tuple(request for request in recorded if request.at_s >= scaling.skip_s)
    span = recorded[-1].at_s - recorded[0].at_s
    stretch = (len(recorded) - 1) / span / scaling.rate
    arrivals: list[Recorded] = []
    left_out = seen = 0
    now, before = 0.0, recorded[0].at_s
    for request in recorded:
        bursting = scaling.burst_at_s <= now < scaling.burst_at_s + scaling.burst_s
        now += (request.at_s - before) * stretch / (scaling.burst_factor if bursting else 1.0)
        before = request.at_s
        if now >= scaling.seconds:
            break
        seen += 1
        prompt = max(1, round(request.prompt_tokens / scaling.prompt_divisor))
        output = max(1, round(request.output_tokens / scaling.output_divisor))
        if prompt + output > scaling.context:
            left_out += 1
            continue
        arrivals.append(Recorded(now, prompt, output))
    return Replay(tuple(arrivals), 100.0 * left_out / seen)
