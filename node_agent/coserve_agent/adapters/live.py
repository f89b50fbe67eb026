"""NAME@live: the adapter NAME as it is while a job here trains it, after its last optimizer step.

A copy of the weights is taken when a request asks and the job has made a step since the last copy; a request keeps the
copy with which it began.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coserve_agent.adapters.served import Served
from coserve_agent.engine.client import EngineClient
from coserve_engine.messages import AdapterLoaded, AdapterVersion

log = logging.getLogger(__name__)

SUFFIX = "@live"
MOST_COPIES = 4
"""Of one job: while requests use so many, others get the newest of them."""


@dataclass(frozen=True)
class Training:
    """A job that trains here. `engine_job` is what the engine calls it, `step` the last one that is known here."""

    adapter: str
    engine_job: str
    step: int
    variables: Mapping[str, Any]


@dataclass
class _Copy:
    served: Served
    version: AdapterVersion
    asked_at_step: int
    uses: int = 0


class LiveAdapters:
    """`training` tells of the jobs that train here now; `base` is the model that they adapt."""

    def __init__(self, engine: EngineClient, training: Callable[[], Iterable[Training]], base: Served) -> None:
        self._engine = engine
        self._training = training
        self._base = base
        self._copies: dict[str, list[_Copy]] = {}
        """By the engine's name of the job, the newest last."""
        self._number = itertools.count(1)

    def listing(self) -> list[Served]:
        return [self._served(one, None) for one in sorted(self._training(), key=lambda one: one.adapter)]

    def resolve(self, name: str) -> Served | None:
        job = self._job(name)
        return None if job is None else self._served(job, None)

    def take(self, name: str) -> Served | None:
        """What a request that begins now runs on, and keeps until it lets it go."""
        job = self._job(name)
        self.sweep()
        if job is None or not self._engine.alive:
            return None
        copies = self._copies.setdefault(job.engine_job, [])
        stale = not copies or copies[-1].asked_at_step != job.step
        if stale and sum(one.uses > 0 for one in copies) < MOST_COPIES:
            copies.append(self._copy(job))
            self.sweep()
        newest = self._copies[job.engine_job][-1]
        newest.uses += 1
        return newest.served

    def let_go(self, version: AdapterVersion) -> None:
        for one in self._of(version):
            one.uses -= 1
        self.sweep()

    def sweep(self) -> None:
        """Forget copies that no request uses: all but the newest of a job, and that too once the job does not train."""
        here = {one.engine_job for one in self._training()}
        for job, copies in list(self._copies.items()):
            newest = copies[-1] if job in here else None
            kept = [one for one in copies if one.uses or one is newest]
            for one in copies:
                if one not in kept and self._engine.alive:
                    self._engine.unload_adapter(one.version)
            if kept:
                self._copies[job] = kept
            else:
                del self._copies[job]

    def _of(self, version: AdapterVersion) -> list[_Copy]:
        return [one for copies in self._copies.values() for one in copies if one.version == version]

    def _job(self, name: str) -> Training | None:
        """The job that trains this name; of several the one that was bound last."""
        if not name.endswith(SUFFIX):
            return None
        adapter = name.removesuffix(SUFFIX)
        return next((one for one in reversed(list(self._training())) if one.adapter == adapter), None)

    def _copy(self, job: Training) -> _Copy:
        version = AdapterVersion(f"{job.engine_job}{SUFFIX}", next(self._number))

        def copied(future: asyncio.Future[AdapterLoaded]) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                log.info("adapter %s%s: no copy: %s", job.adapter, SUFFIX, error)
                self._forget(job.engine_job, version)
            else:
                log.debug("adapter %s%s: a copy of step %s", job.adapter, SUFFIX, future.result().step)

        self._engine.copy_adapter(version, job.engine_job).add_done_callback(copied)
        return _Copy(self._served(job, version), version, job.step)

    def _forget(self, job: str, version: AdapterVersion) -> None:
        left = [one for one in self._copies.get(job, ()) if one.version != version]
        if left:
            self._copies[job] = left
        else:
            self._copies.pop(job, None)

    def _served(self, job: Training, version: AdapterVersion | None) -> Served:
        variables = {**self._base.variables, **job.variables}
        return Served(
            job.adapter + SUFFIX, version, f"job {job.engine_job}", int(time.time()), self._base.name, variables
        )
