"""What the operator is for a cluster: looks at each job, binds, publishes, tries again, and says how it is."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.http.errors import ApiError
from coserve_agent.jobs.worker import Worker
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.settings import AgentSettings
from coserve_agent.standalone.admission import There, admitted
from coserve_agent.standalone.decide import Decision, Seen, decide
from coserve_agent.standalone.feeders import Feeders
from coserve_agent.standalone.history import History
from coserve_agent.standalone.job import Job, JobTable
from coserve_agent.standalone.queue import Places, Waiting, places
from coserve_agent.standalone.spec import JobRequest
from coserve_agent.standalone.told import binding_of, feeder_environment, outside
from coserve_agent.standalone.view import Place, view
from coserve_api.endpoint import FinetuningPolicy
from coserve_contract.away import STORE_AWAY
from coserve_contract.local.binder import LocalBinder
from coserve_contract.local.store import LocalStore
from coserve_contract.messages import AdapterRecord, Completed, Desired
from coserve_contract.store import JobRecord

log = logging.getLogger(__name__)

LOOK_S = 0.5


class Controller:
    """All jobs of a directory, of which this server has the lock.

    Args:
        agent: this start of the server.
        loaded: the names of adapters that were loaded by hand.
        now_s: the time since 1970.
    """

    def __init__(
        self,
        settings: AgentSettings,
        agent: str,
        *,
        store: LocalStore,
        worker: Worker,
        registry: AdapterRegistry,
        lifecycle: Lifecycle,
        feeders: Feeders,
        history: History,
        loaded: Callable[[], Set[str]],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._store = store
        self._binder = LocalBinder(store.database)
        self._table = JobTable(store.database)
        self._worker = worker
        self._registry = registry
        self._lifecycle = lifecycle
        self._feeders = feeders
        self._loaded = loaded
        self._now_s = now_s
        self._jobs: dict[str, Job] = {}
        self._records: dict[str, JobRecord] = {}
        self._places: dict[str, Place] = {}
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._looked = asyncio.Event()
        self.history = history

    # ---- what is asked ----

    def views(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        jobs = sorted(self._jobs.values(), key=lambda job: (job.created_s, job.uid), reverse=True)
        return [self._view(job) for job in jobs]

    def view(self, name: str) -> dict[str, Any] | None:
        job = self._jobs.get(name)
        return None if job is None else self._view(job)

    def publishers(self) -> dict[str, str]:
        """The names under which jobs publish, or did, each with the job's name, or its uid where it is gone."""
        gone = {name: record.job_uid for name, record in self._registry.published().items()}
        return gone | {job.spec.adapter.name: job.name for job in self._jobs.values()}

    def logs(self, uid: str) -> Path | None:
        """The folder with a job's training log as of its last checkpoint, or its end."""
        record = self._records.get(uid, JobRecord())
        files = record.result.adapter if isinstance(record.result, Completed) else None
        last = files or record.checkpoint
        return None if last is None else self._settings.artifact_store / last.path

    @property
    def draining(self) -> bool:
        return self._lifecycle.draining

    async def looked(self) -> None:
        """Wait for the next look at all jobs."""
        await self._looked.wait()

    async def create(self, request: JobRequest) -> dict[str, Any]:
        """Take a job. ApiError where it cannot be taken."""
        async with self._lock:
            published, _ = await self._store.published()
            checkpoints = {uid: record.checkpoint for uid, record in self._records.items() if record.checkpoint}
            there = There(self._jobs, published, checkpoints, self._loaded())
            job = admitted(request, there, self._settings, self._now_s())
            await self._keep(job)
        self._wake.set()
        log.info("job %s: taken, uid %s", job.name, job.uid)
        return self._view(job)

    async def change(self, name: str, **changes: Any) -> dict[str, Any]:
        """Suspend, resume, cancel or delete a job. ApiError 404 where there is none, 409 where it is over."""
        async with self._lock:
            job = self._jobs.get(name)
            if job is None:
                raise ApiError(404, f"there is no job {name!r}; GET /v1/finetune_jobs lists them", code="job_not_found")
            if job.ended is not None and "deleted" not in changes:
                raise ApiError(409, f"job {name} is over ({job.ended.state}): make a new one", code="job_over")
            if "suspended" in changes:
                changes["begun_s"] = None
            job = job.model_copy(update=changes)
            await self._keep(job)
        self._wake.set()
        return self._view(job)

    def _view(self, job: Job) -> dict[str, Any]:
        record, place = self._records.get(job.uid, JobRecord()), self._places.get(job.uid, Place())
        return view(job, record, place, self._settings.artifact_store, self._now_s())

    # ---- what is done ----

    async def start(self) -> None:
        """Read what is kept; from here on who wrote under an earlier start may write no more."""
        async with self._lock:
            self._jobs = {job.name: job for job in await self._table.all()}
            await self._store.set_incarnation(self._agent)
            kept = {job.uid for job in self._jobs.values()}
            for uid in await self._store.job_uids() - kept:
                await self._store.delete_job(uid)
            for uid in kept:
                self._records[uid] = await self._store.job(uid)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._wake.clear()
                try:
                    async with self._lock:
                        await self._look()
                except STORE_AWAY as error:
                    log.warning("jobs: tries again in %g s: %s", LOOK_S, error)
                self._looked.set()
                self._looked = asyncio.Event()
                try:
                    await asyncio.wait_for(self._wake.wait(), LOOK_S)
                except TimeoutError:
                    continue
        finally:
            await self._feeders.close()

    async def _look(self) -> None:
        decisions = [await self._settle(job) for job in list(self._jobs.values())]
        bound = [one.job.uid for one in decisions if one.bound]
        waiting = [self._waiting(one.job) for one in decisions if one.wants]
        allowed = self._settings.finetuning is FinetuningPolicy.ALLOWED
        most = self._settings.max_concurrent_jobs if allowed else 0
        found = places(waiting, len(bound), most)
        if not self._lifecycle.draining:
            for uid in found.begin:
                await self._begin(self._named(uid))
            await self._feed([*bound, *found.fed])
        self._places = _places(bound, found)

    async def _settle(self, job: Job) -> Decision:
        """Decide on a job, and do it."""
        record = self._records.get(job.uid, JobRecord())
        if job.ended is None or (record.fence is not None and record.fence.agent):
            record = self._records[job.uid] = await self._store.job(job.uid)
        seen = Seen(
            record,
            runs=job.uid in self._worker.beats(),
            feeder_failed=outside(job, self._settings) or self._feeders.failed(job.uid),
            served=self._served(record),
        )
        decision = decide(job, seen, self._agent, self._now_s())
        if decision.job != job:
            await self._keep(decision.job)
            if decision.job.ended is not None and job.ended is None:
                ended = decision.job.ended
                log.info("job %s: %s: %s", job.name, ended.state, ended.message or ended.reason)
        if decision.publish is not None:
            await self._publish(decision.publish)
        if record.fence is not None and decision.unbind:
            await self._binder.unbind(job.uid, record.fence.agent, record.fence.epoch)
            if decision.job.ended is not None:
                await self._store.clear_streams(job.uid)
        if record.fence is not None and decision.stop:
            stop = binding_of(job, record.fence.epoch, self._settings, Desired.STOP)
            await self._binder.rebrief(job.uid, self._agent, stop)
        if decision.forget:
            await self._forget(job)
        return decision

    async def _begin(self, job: Job) -> None:
        fence = self._records[job.uid].fence
        epoch = 1 + (fence.epoch if fence else 0)
        if job.begun_s is None:
            job = job.model_copy(update={"begun_s": self._now_s()})
            await self._keep(job)
        refused = await self._binder.bind(job.uid, self._agent, binding_of(job, epoch, self._settings))
        if refused is not None:
            log.error("job %s: cannot be bound: %s", job.name, refused)

    async def _feed(self, uids: list[str]) -> None:
        jobs = [self._named(uid) for uid in uids]
        await self._feeders.keep({job.uid: feeder_environment(job, self._settings) for job in jobs})

    async def _publish(self, record: AdapterRecord) -> None:
        published, _ = await self._store.published()
        before = published.get(record.name)
        if before is None or before.number < record.number:
            await self._store.set_adapters({**published, record.name: record}.values())

    async def _forget(self, job: Job) -> None:
        folder = self._settings.artifact_store / "jobs" / job.uid
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        await self._store.delete_job(job.uid)
        await self._table.delete(job.uid)
        self.history.forget(job.uid)
        self._records.pop(job.uid, None)
        self._jobs.pop(job.name, None)
        log.info("job %s: deleted; its adapter stays", job.name)

    async def _keep(self, job: Job) -> None:
        await self._table.put(job)
        self._jobs[job.name] = job

    # ---- what is seen ----

    def _served(self, record: JobRecord) -> bool:
        """Whether the adapter that a job wrote answers, or cannot be loaded."""
        files = record.result.adapter if isinstance(record.result, Completed) else None
        if files is None:
            return False
        gone = any((one.name, one.number) == (files.name, files.number) for one in self._registry.failures())
        return gone or self._registry.numbers().get(files.name, 0) >= files.number

    def _waiting(self, job: Job) -> Waiting:
        feed = self._records[job.uid].feed
        waits = job.faults is not None and job.faults.until_s > self._now_s()
        return Waiting(job, ready=feed is not None and feed.total_steps > 0, waits=waits)

    def _named(self, uid: str) -> Job:
        return next(job for job in self._jobs.values() if job.uid == uid)


def _places(bound: list[str], found: Places) -> dict[str, Place]:
    """Where each job stands."""
    stands = {uid: Place(bound=True) for uid in (*bound, *found.begin)}
    return stands | {uid: Place(fed=uid in found.fed, number=n) for n, uid in enumerate(found.queue, start=1)}
