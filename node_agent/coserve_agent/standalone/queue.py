"""Which jobs run, and which are fed: by priority, then by age. Who runs is not pushed aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve_agent.standalone.job import Job


@dataclass(frozen=True)
class Waiting:
    """A job that wants to run. `ready`: its data are known; `waits`: it may not begin yet."""

    job: Job
    ready: bool = False
    waits: bool = False


@dataclass(frozen=True)
class Places:
    """Uids. `begin` are bound now; `fed` hold a feeder, of those that wait; `queue` says who is next."""

    begin: tuple[str, ...]
    fed: tuple[str, ...]
    queue: tuple[str, ...]


def places(waiting: Sequence[Waiting], running: int, most: int) -> Places:
    """`running` of `most` places are taken. Fed are those that have a place, and one more."""
    free = max(0, most - running)
    order = sorted(waiting, key=lambda one: (-one.job.spec.priority, one.job.created_s, one.job.uid))
    able = [one for one in order if not one.waits]
    fed = able[: free + 1] if most else []
    begin = [one for one in fed if one.ready][:free]
    queue = [one for one in order if one not in begin]
    return Places(*(tuple(one.job.uid for one in some) for some in (begin, fed, queue)))
