"""When requests come and how long they are: read from a trace, or drawn."""

from __future__ import annotations

import csv
import random
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from coserve_engine.simulate.errors import SimulationError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Of the Azure LLM inference traces (Patel et al., Splitwise, ISCA 2024)."""


class Arrival(NamedTuple):
    """A request: seconds since the trace began, tokens of prompt and output."""

    at_s: float
    prompt: int
    output: int


def read_trace(path: Path, count: int, prompt_divisor: float = 1.0, output_divisor: float = 1.0) -> list[Arrival]:
    """The first `count` requests, lengths divided and rounded up to one token at least.

    Raises:
        SimulationError: the file cannot be read, lacks a column, or has a value that is none, out of order or negative.
    """
    found: list[Arrival] = []
    first: datetime | None = None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise SimulationError(f"{path} has no column {missing}; the first line must name {', '.join(COLUMNS)}")
            for row in reader:
                at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                first = first or at
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                if prompt < 0 or output < 0:
                    raise ValueError(f"{prompt} and {output} tokens")
                length = max(1, round(prompt / prompt_divisor)), max(1, round(output / output_divisor))
                found.append(Arrival((at - first).total_seconds(), *length))
                if found[-1].at_s < found[max(0, len(found) - 2)].at_s:
                    raise ValueError("it lies before the line above; sort the trace by time")
                if len(found) == count:
                    break
    except OSError as error:
        raise SimulationError(f"{path} cannot be read ({error.strerror}); name a CSV file with --trace") from None
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path}, line {len(found) + 2}: {error}") from None
    if len(found) < 2:
        raise SimulationError(f"{path} holds {len(found)} requests; at least 2 are needed")
    return found


def drawn(count: int, rate: float, burstiness: float, prompt: int, output: int, seed: int) -> list[Arrival]:
    """Arrivals with gamma-distributed gaps of mean 1 / `rate` seconds and coefficient of variation `burstiness`
    (1: Poisson), lengths exponential around their means.
    """
    source = random.Random(seed)
    shape = 1.0 / burstiness**2
    now, found = 0.0, []
    for _ in range(count):
        now += source.gammavariate(shape, 1.0 / (shape * rate))
        lengths = (max(1, round(source.expovariate(1.0 / mean))) for mean in (prompt, output))
        found.append(Arrival(now, *lengths))
    return found


def at_rate(arrivals: list[Arrival], rate: float) -> list[Arrival]:
    """The same requests, the time stretched so that `rate` of them come each second on average."""
    factor = mean_rate(arrivals) / rate
    return [Arrival(a.at_s * factor, a.prompt, a.output) for a in arrivals]


def mean_rate(arrivals: list[Arrival]) -> float:
    """Requests a second."""
    return (len(arrivals) - 1) / max(arrivals[-1].at_s - arrivals[0].at_s, 1e-9)
