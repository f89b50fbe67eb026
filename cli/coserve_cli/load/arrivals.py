"""When requests are sent, and how long they are."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """Seconds after the beginning; tokens of prompt and answer."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def poisson(count: int, rate: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Arrival]:
    """`count` requests of one size, `rate` a second on average, with exponential gaps."""
    source, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        arrivals.append(Arrival(at_s, prompt_tokens, output_tokens))
        at_s += source.expovariate(rate)
    return arrivals


def recorded(path: Path, count: int, rate: float | None) -> list[Arrival]:
    """The first `count` requests of a trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens (that of
    Azure's public data set), at their own times, or stretched to `rate` a second on average.

    Raises:
        ValueError: a line does not read; it is named.
    """
    arrivals: list[Arrival] = []
    first: datetime | None = None
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            if len(arrivals) == count:
                break
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                prompt, output = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a row of a trace: {error!r}") from None
            first = first or at
            arrivals.append(Arrival((at - first).total_seconds(), prompt, output))
    if not arrivals:
        raise ValueError(f"{path}: has no row")
    if rate is None or arrivals[-1].at_s == 0:
        return arrivals
    stretch = (len(arrivals) - 1) / arrivals[-1].at_s / rate
    return [Arrival(one.at_s * stretch, one.prompt_tokens, one.output_tokens) for one in arrivals]
