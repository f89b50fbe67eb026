"""Who computes next among finetuning jobs: shares in proportion to priority, by start-time fair queueing (Goyal, Vin
and Cheng, 1996).

Each job has a virtual time that grows by its work / weight; the job with the lowest goes first. A job that begins, or
begins again after it had nothing to do, starts at the virtual time of those that compute: it has saved up no credit
and owes nothing. Work is counted in rows x layers, which depends on what was done alone, never on a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Claim:
    weight: float
    time: float


@dataclass(slots=True)
class FairShare:
    """Virtual times of the jobs, in rows x layers per unit of weight."""

    now: float = 0.0
    """The highest virtual time that any job has been served at."""
    _claims: dict[str, _Claim] = field(default_factory=dict)

    def join(self, job: str, weight: float) -> None:
        """A job that may get something to do; `weight` > 0."""
        self._claims[job] = _Claim(weight, self.now)

    def reweigh(self, job: str, weight: float) -> None:
        """Another weight for what is charged from now on; a job that is not here has none."""
        if job in self._claims:
            self._claims[job].weight = weight

    def leave(self, job: str) -> None:
        self._claims.pop(job, None)

    def wake(self, job: str) -> None:
        """A job that had nothing to do has something again."""
        claim = self._claims[job]
        claim.time = max(claim.time, self.now)

    def charge(self, job: str, work: float) -> None:
        """Work was done for a job, also where it is thrown away later: it was the job's time on the device."""
        claim = self._claims[job]
        claim.time += work / claim.weight

    def order(self, jobs: Iterable[str]) -> list[str]:
        """These jobs, which have something to do, by claim: lowest virtual time first, then by name."""
        ordered = sorted(jobs, key=lambda job: (self._claims[job].time, job))
        if ordered:
            self.now = max(self.now, self._claims[ordered[0]].time)
        return ordered
