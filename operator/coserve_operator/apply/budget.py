"""When a status is written: a change of state at once, mere figures now and then. There may be thousands of objects, so
how often follows how many there are, and all of a kind together have so many writes a second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Status = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """Fields that may wait: of each object they are written every `least_s` seconds at most, of all objects together
    `per_s` times a second.
    """

    fields: frozenset[str]
    least_s: float
    per_s: float


PROGRESS = Figures(frozenset({"progress", "checkpoint", "queuePosition"}), 2.0, 20.0)
"""Of jobs that run: every 2 s of 40, every 50 s of 1000. Such a write costs the API server some 10 ms of a core."""
QUEUE = Figures(PROGRESS.fields, 10.0, 4.0)
"""Of jobs that wait: when one is bound, the places of all behind it change."""
LOAD = Figures(frozenset({"saturationPercent", "slo"}), 10.0, 6.0)
"""Of endpoints."""
EARLY = 0.5
"""Part of the time after which figures are written if the object is looked at anyway: so those of one group come to be
written in one pass.
"""
BURST_S = 2.0
"""So many seconds' writes may come at once."""


class StatusBudget:
    """Remembers when the status of each object was written last, and how many objects there are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._written: dict[str, float] = {}
        self._kind: dict[str, Figures] = {}
        self._count: dict[Figures, int] = {}
        self._buckets: dict[Figures, _Bucket] = {}

    def every_s(self, figures: Figures) -> float:
        """Return how often the figures of one object are written."""
        return max(figures.least_s, self._count.get(figures, 0) / figures.per_s)

    def progress_s(self) -> float:
        """Return how often the progress of a job is written."""
        return self.every_s(PROGRESS)

    def load_s(self) -> float:
        """Return how often the load of an endpoint is."""
        return self.every_s(LOAD)

    def delay_s(self, uid: str, old: Status, new: Status, figures: Figures) -> float | None:
        """Return in how many seconds to write `new`: 0 is now, None is never, since nothing changed."""
        self._note(uid, figures)
        if old == new:
            return None
        if _without(old, figures.fields) != _without(new, figures.fields):
            return 0.0
        now, every_s = self._clock(), self.every_s(figures)
        written = self._written.get(uid)
        if written is not None and now - written < max(figures.least_s, every_s * EARLY):
            return written + every_s - now
        bucket = self._buckets.setdefault(figures, _Bucket(figures.per_s * BURST_S, now))
        return 0.0 if bucket.take(figures.per_s, now) else every_s

    def written(self, uid: str) -> None:
        """Note that the object's status was written now."""
        self._written[uid] = self._clock()

    def forget(self, uid: str) -> None:
        """Drop an object that is gone, or over."""
        self._written.pop(uid, None)
        known = self._kind.pop(uid, None)
        if known is not None:
            self._count[known] -= 1

    def _note(self, uid: str, figures: Figures) -> None:
        known = self._kind.get(uid)
        if known is not figures:
            if known is not None:
                self._count[known] -= 1
            self._kind[uid] = figures
            self._count[figures] = self._count.get(figures, 0) + 1


@dataclass
class _Bucket:
    """A token for each write that may be made now."""

    left: float
    at: float

    def take(self, per_s: float, now: float) -> bool:
        self.left, self.at = min(per_s * BURST_S, self.left + (now - self.at) * per_s), now
        if self.left < 1:
            return False
        self.left -= 1
        return True


def _without(status: Status, fields: frozenset[str]) -> Status:
    return {name: value for name, value in status.items() if name not in fields}
