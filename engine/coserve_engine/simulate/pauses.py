"""Pauses of the simulated machine: times in which it computes nothing, for another process or guest has it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from coserve_engine.simulate.errors import SimulationError


@dataclass(frozen=True, slots=True)
class Pauses:
    """`per_s` pauses a second on average (a Poisson process), each as long as one of `ms`, drawn with equal chances."""

    per_s: float
    ms: tuple[float, ...]


NONE = Pauses(0.0, ())
HEAVY = Pauses(0.2, tuple(range(20, 121)))
"""One in 5 s, of 20 to 120 ms."""
PAUSES = {"none": NONE, "heavy": HEAVY}


class Pausing:
    """The pauses of one run, in order of time."""

    def __init__(self, pauses: Pauses, seed: int) -> None:
        self._pauses, self._source = pauses, random.Random(seed)
        self._next_s = 0.0
        self.total_s = 0.0
        """Of all pauses until now."""
        self._draw()

    def _draw(self) -> None:
        per_s = self._pauses.per_s
        self._next_s += self._source.expovariate(per_s) if per_s > 0 else math.inf

    def after(self, now_s: float, work_s: float) -> float:
        """When work of so many seconds that begins now is done."""
        while self._next_s < now_s:  # nobody computed, so nobody was stopped
            self._draw()
        end_s = now_s + work_s
        while self._next_s < end_s:
            pause_s = self._source.choice(self._pauses.ms) / 1e3
            end_s += pause_s
            self.total_s += pause_s
            self._next_s += pause_s
            self._draw()
        return end_s


def read_pauses(name: str) -> Pauses:
    """One of PAUSES, or a JSON file {"per_s": a second, "ms": [length, ...]}.

    Raises:
        SimulationError: neither, or a field is missing or no number of at least zero.
    """
    if name in PAUSES:
        return PAUSES[name]
    try:
        raw = json.loads(Path(name).read_text(encoding="utf-8"))
        per_s, lengths = raw["per_s"], tuple(raw["ms"])
    except OSError as error:
        raise SimulationError(
            f"pauses {name!r} is neither {' nor '.join(PAUSES)} nor a file ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        form = '{"per_s": number, "ms": [number, ...]}'
        raise SimulationError(f"pauses file {name} must hold {form}: {error!r}") from None
    for field, value in (("per_s", per_s), *(("ms", ms) for ms in lengths)):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise SimulationError(f"pauses file {name}: {field} is {value!r}; it must be a number >= 0")
    if per_s > 0 and not lengths:
        raise SimulationError(f"pauses file {name}: ms is empty; list the length of at least one pause")
    return Pauses(float(per_s), lengths)
