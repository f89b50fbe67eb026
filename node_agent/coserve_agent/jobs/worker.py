"""Which jobs this agent runs: looks at its bindings twice a second and starts, stops or drops a run for each."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from coserve_agent.adapters.live import Training
from coserve_agent.concurrency import end
from coserve_agent.jobs.run import JobRun
from coserve_agent.jobs.surroundings import Surroundings
from coserve_agent.lifecycle import Lifecycle
from coserve_contract.away import STORE_AWAY
from coserve_contract.messages import Binding, Desired, JobBeat

log = logging.getLogger(__name__)

POLL_S = 0.5


@dataclass
class _Running:
    run: JobRun
    task: asyncio.Task[None]


class Worker:
    """Runs what is bound to `agent`, once the model is loaded, until the agent drains."""

    def __init__(self, around: Surroundings, agent: str, lifecycle: Lifecycle) -> None:
        self._around = around
        self._agent = agent
        self._lifecycle = lifecycle
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, int] = {}
        self._complaints: tuple[str, ...] = ()

    def beats(self) -> dict[str, JobBeat]:
        """The jobs that run here, for the heartbeat."""
        return {job: JobBeat(epoch=one.run.epoch, step=one.run.step) for job, one in self._running.items()}

    def training(self) -> list[Training]:
        """The jobs whose adapters can be served as they are now, in the order in which they were bound."""
        return [one for one in (each.run.training for each in self._running.values()) if one is not None]

    async def run(self) -> None:
        """Until cancelled; every run is dropped then."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(POLL_S)
        finally:
            await end(*(one.task for one in self._running.values()))

    async def drain(self) -> None:
        """Give every job back."""
        self._reap()
        for one in self._running.values():
            one.run.request_stop("the agent shuts down")
        if self._running:
            await asyncio.wait([one.task for one in self._running.values()])

    async def _look(self) -> None:
        self._reap()
        try:
            bindings, broken = await self._around.store.bindings(self._agent)
            current = await self._around.store.incarnation()
        except STORE_AWAY:
            return  # the heartbeat says so in the log; what runs goes on
        complaints = tuple(str(error) for error in broken)
        if complaints != self._complaints:
            self._complaints = complaints
            for complaint in complaints:
                log.error("binding: %s", complaint)
        if not current or current != self._around.fencing.incarnation:
            return  # Redis was emptied: that a binding is missing means nothing until we are registered again
        for job in [job for job in self._running if job not in bindings]:
            await self._drop(job, "its binding is gone")
        for job, binding in bindings.items():
            await self._obey(job, binding)

    async def _obey(self, job: str, binding: Binding) -> None:
        running = self._running.get(job)
        if running is not None and running.run.epoch < binding.epoch:
            await self._drop(job, f"it is bound again under epoch {binding.epoch}")
            running = None
        if running is None:
            over = self._ended.get(job, 0) >= binding.epoch
            if over or self._lifecycle.draining or not self._lifecycle.model_loaded:
                return
            run = JobRun(self._around, binding)
            self._running[job] = running = _Running(run, asyncio.create_task(run.run(), name=f"job {run.name}"))
        running.run.update(binding)
        if binding.desired is Desired.STOP:
            running.run.request_stop("it is asked to")

    async def _drop(self, job: str, why: str) -> None:
        running = self._running[job]
        log.warning("job %s: dropped: %s", running.run.name, why)
        await end(running.task)
        self._reap()

    def _reap(self) -> None:
        for job, one in list(self._running.items()):
            if one.task.done():
                del self._running[job]
                self._ended[job] = one.run.epoch
                if not one.task.cancelled() and (error := one.task.exception()) is not None:
                    log.error("job %s: the agent's own mistake", one.run.name, exc_info=error)
