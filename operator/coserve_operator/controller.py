"""One reconcile of a group: look, decide by the pure functions, then act, each status before anything in Redis.

A fault of one job does not keep the others from being served: faults are collected, and the group is tried again.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_api.job_status import ContinuedFrom, PublishedAdapter
from coserve_contract.messages import AdapterRecord
from coserve_operator.apply.budget import PROGRESS, QUEUE, StatusBudget
from coserve_operator.apply.endpoint import EndpointApplier, Reconciliation
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.feeder import FeederApplier
from coserve_operator.apply.hindrances import LISTEN_S, LOOK_AGAIN_S, Hindrances
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.apply.status import greet, refuse, write_status
from coserve_operator.decide import job as jobs
from coserve_operator.decide import job_status
from coserve_operator.decide.actions import Forget
from coserve_operator.decide.claims import claims
from coserve_operator.decide.decision import Decision, ObservedJob, is_final
from coserve_operator.decide.feeding import feed_the_next
from coserve_operator.decide.finished import Finished
from coserve_operator.decide.observed import Obstacle, Unreadable
from coserve_operator.decide.placement import Bound, Waiting, capacity, created, place, surplus
from coserve_operator.decide.published import (
    Publication,
    Versions,
    last_numbers,
    owners,
    publication,
    published,
    served,
)
from coserve_operator.decide.sources import checkpoint_left, continued_from
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, ConflictError, Kube, KubeError
from coserve_operator.manifests.feeder import inputs_digest
from coserve_operator.redis.store import StoreError
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.watch.cache import Cache, Group, Name
from coserve_operator.watch.views import feeder_view

logger = logging.getLogger(__name__)

RETRY_S = 1.0
STRAY_S = 10.0
UNREADABLE_S = 30.0


class ReconcileError(Exception):
    """Something of a group could not be done now; what could be done was."""


@dataclass
class Controller:
    """Reconciles groups. `now` is the time of day; all that lasts is in the API server and in Redis."""

    settings: Settings
    kube: Kube
    stores: Stores
    cache: Cache
    applier: Applier
    budget: StatusBudget
    recorder: Recorder
    metrics_slot: MetricsSlotKeeper
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self._endpoints = EndpointApplier(
            self.settings,
            self.kube,
            self.stores,
            self.cache,
            self.applier,
            self.budget,
            self.recorder,
            self.metrics_slot,
        )
        self._feeders = FeederApplier(self.settings, self.kube, self.stores, self.cache)
        self._obstacles: dict[Name, dict[str, Obstacle]] = {}
        """What keeps feeders from being made, by group and by the job's uid, as of the last pass."""

    async def reconcile(self, name: Name) -> float | None:
        """Bring one group forward; return in how many seconds to look again, None when only a change is a reason to."""
        now, faults = self.now(), _Faults()
        group = await self._greet(name, now, faults)
        run = Reconciliation(name[0], group, now)
        for unreadable in group.unreadable:
            with faults.of(f"{unreadable.kind.name} {unreadable.metadata.name}"):
                await refuse(self.kube, self.cache, self.budget, unreadable, now)
        going = group.endpoint is not None and group.endpoint.metadata.deletion_timestamp is not None
        if going or any(each.kind is ENDPOINT for each in group.unreadable):
            for job in group.jobs if going else ():
                if not job.status.observed_generation:  # nothing was said of it yet
                    observed = ObservedJob(job, endpoint=None, endpoint_goes=True)
                    with faults.of(f"FinetuneJob {job.metadata.name}"):
                        await self._act(observed, jobs.decide(observed, now), run)
            faults.check()
            return None  # nothing is made that the garbage collector would take; its jobs go on as they are
        if group.endpoint is not None:
            await self._read_redis(run, group, faults)
            self._endpoints.plan(run)
        known = self._obstacles.pop(name, {})
        observations = self._observe(run, known)
        decisions = self._decide(observations, run)
        for job in group.jobs:
            observed, decision = observations[job.metadata.uid], decisions[job.metadata.uid]
            with faults.of(f"FinetuneJob {job.metadata.name}"):
                await self._act(observed, decision, run)
            await asyncio.sleep(0)  # of thousands of jobs, a pass must not keep the Lease from being renewed
        if group.endpoint is not None:
            run.decisions = decisions
            with faults.of("Redis"):
                await self._clean_up(run, observations, decisions)
            with faults.of(f"InferenceEndpoint {name[1]}"):
                await self._endpoints.act(run)
        await self._end(run, self.cache.finished(name), faults)
        if run.obstacles:
            self._obstacles[name] = run.obstacles
        if run.obstacles != known:
            run.requeue_after(0.0)
        faults.check()
        return run.requeue_after_s

    async def _greet(self, name: Name, now: datetime, faults: "_Faults") -> Group:
        """Write the first statuses before anything else is asked, and return the group."""
        group = self.cache.group(name)
        objects: list[InferenceEndpoint | FinetuneJob] = [*group.jobs]
        if group.endpoint is not None:
            objects.insert(0, group.endpoint)
        new = [each for each in objects if not each.status.conditions and each.metadata.deletion_timestamp is None]
        for each in new:
            with faults.of(f"{each.kind} {each.metadata.name}"):
                await greet(self.kube, self.cache, self.budget, each, now)
        return self.cache.group(name) if new else group

    async def _read_redis(self, run: Reconciliation, group: Group, faults: "_Faults") -> None:
        assert group.endpoint is not None
        uid, store = group.endpoint.metadata.uid, self.stores.of(group.endpoint.metadata.namespace)
        with faults.of("Redis"):
            try:
                await store.assert_user(uid)
                found = (await store.read({uid: [job.metadata.uid for job in group.jobs]}))[uid]
            except StoreError as error:
                run.unreadable = Unreadable(error.reason, str(error))
                raise
            if isinstance(found, Unreadable):
                run.unreadable = found
                run.requeue_after(UNREADABLE_S)
            else:
                run.redis = found

    def _observe(self, run: Reconciliation, obstacles: dict[str, Obstacle]) -> dict[str, ObservedJob]:
        group, endpoint = run.group, run.group.endpoint
        in_redis = run.redis.adapters if run.redis is not None else {}
        known: Versions = {}
        numbers: dict[str, int] = {}
        sources: dict[str, AdapterRecord] = {}
        if endpoint is not None:
            by_jobs = _publications(group, lambda job: job.status.adapter)
            known = published(endpoint, by_jobs, in_redis)
            run.published, run.owners = known, owners(endpoint, by_jobs)
            numbers = last_numbers(endpoint, known)
            sources = {name: versions[0] for name, versions in known.items()} | served(endpoint, known)
        claimed = claims((job for job in group.jobs if not is_final(job)), known.keys(), run.owners)
        left = _checkpoints_left(group)
        observations, too_many, kept = {}, _surplus(run), _kept_pods(run)
        for job in group.jobs:
            name, feeder = job.metadata.name, group.feeders.get(job.metadata.name)
            if feeder is not None and not self._feeders.owns(job, feeder):
                feeder = None
            observations[job.metadata.uid] = ObservedJob(
                job=job,
                endpoint=endpoint,
                claims=claimed,
                redis=run.redis,
                feeder=feeder_view(feeder, group.feeder_pods.get(name, ())) if feeder is not None else None,
                feeder_inputs=inputs_digest(job, endpoint) if endpoint is not None else "",
                feeder_secret=self._feeders.secret(endpoint) if endpoint is not None else "",
                leaving=run.leaving_agents,
                adapter_number=numbers.get(job.spec.adapter.name, 0) + 1,
                source=continued_from(job, endpoint, sources, left) if endpoint is not None else None,
                surplus=job.metadata.uid in too_many,
                disrupted=(job.status.binding.agent if job.status.binding else "") not in kept,
                unreadable=run.unreadable,
                obstacle=obstacles.get(job.metadata.uid),
            )
        return observations

    def _decide(self, observations: dict[str, ObservedJob], run: Reconciliation) -> dict[str, Decision]:
        decisions = {uid: jobs.decide(observed, run.now) for uid, observed in observations.items()}
        waiting = [
            Waiting(uid, created(observations[uid].job)) for uid, decision in decisions.items() if decision.wants_agent
        ]
        agents = run.redis.agents if run.redis is not None else {}
        bound = {uid: decision.agent for uid, decision in decisions.items() if decision.agent}
        most = run.group.endpoint.spec.finetuning.jobs if run.group.endpoint is not None else 0
        placed = place(waiting, agents, bound, run.leaving_agents, most)
        queue = sorted((each for each in waiting if each.uid not in placed), key=lambda each: each.created)
        places = {each.uid: number for number, each in enumerate(queue, 1)}
        decisions = {
            uid: jobs.assign(observations[uid], decision, agents, placed.get(uid), places.get(uid, 0))
            for uid, decision in decisions.items()
        }
        free = sum(capacity(agents, bound | placed, run.leaving_agents, most).values())
        return feed_the_next(observations, decisions, free, self.settings.endpoint_checks)

    async def _act(self, observed: ObservedJob, decision: Decision, run: Reconciliation) -> None:
        """Write the status of one job; then, and only then, tell Redis and the feeder."""
        job = observed.job
        run.requeue_after(decision.requeue_after_s)
        new = job_status.status_of(observed, decision, run.now)
        figures, told = PROGRESS if decision.agent else QUEUE, new.to_dict()
        delay_s = self.budget.delay_s(job.metadata.uid, job.status.to_dict(), told, figures)
        if delay_s == 0.0:
            if not await write_status(self.kube, self.cache, self.budget, FINETUNE_JOB, job.metadata, told):
                return
            if decision.is_final:
                self.budget.forget(job.metadata.uid)
            await self.recorder.record(FINETUNE_JOB, job.metadata, job_status.events(observed, decision, new), run.now)
        else:
            run.requeue_after(delay_s)
        if observed.endpoint is not None and observed.redis is not None:
            for action in decision.actions:
                meta = observed.endpoint.metadata
                answer = await self.stores.of(meta.namespace).do(meta.uid, action)
                if answer is not None:
                    logger.info("%s %s: %s %s", job.metadata.name, type(action).__name__, decision.reason, answer)
                    run.requeue_after(RETRY_S)
        hindrances = Hindrances()
        with hindrances:
            found = run.group.feeders.get(job.metadata.name)
            run.requeue_after(await self._feeders.act(observed, decision, found))
        obstacle = hindrances.obstacle
        if obstacle is not None:
            run.requeue_after(LOOK_AGAIN_S)
        elif observed.feeder is not None and (observed.feeder.podless or observed.feeder.creating is not None):
            obstacle = await self._feeders.listen(job, observed.feeder, run.now)
            run.requeue_after(LISTEN_S)
        if obstacle is not None:
            run.obstacles[job.metadata.uid] = obstacle
        hindrances.check()

    async def _end(self, run: Reconciliation, over: Finished, faults: "_Faults") -> None:
        """Pause the feeders of jobs that are over, also since this pass, and delete those whose ttlSecondsAfterFinished
        has passed.
        """
        group = run.group
        for name, feeder in group.left_feeders.items():
            if name in over.by_name:
                with faults.of(f"FinetuneJob {name}"):
                    await self._feeders.stop(over.by_name[name].uid, feeder)
        for job in over.due(run.now, group.endpoint):
            logger.info("FinetuneJob %s/%s: is deleted after its ttlSecondsAfterFinished", run.namespace, job.name)
            with faults.of(f"FinetuneJob {job.name}"):
                await self.kube.delete(FINETUNE_JOB, run.namespace, job.name, job.uid, job.version)
        run.requeue_after(over.next_due_s(run.now))

    async def _clean_up(
        self, run: Reconciliation, observations: dict[str, ObservedJob], decisions: dict[str, Decision]
    ) -> None:
        """Keep the index of jobs, drop what jobs left that are over or gone, and begin a new incarnation once all is in
        Redis.
        """
        endpoint, view = run.group.endpoint, run.redis
        assert endpoint is not None
        if view is None:
            return
        uid, store = endpoint.metadata.uid, self.stores.of(endpoint.metadata.namespace)
        fed = {job for job, observed in observations.items() if not is_final(observed.job)}
        if fed - view.known_jobs:
            await store.register(uid, sorted(fed - view.known_jobs))
        unreadable = {each.metadata.uid for each in run.group.unreadable}
        for stray in view.known_jobs - observations.keys() - unreadable:
            await store.do(uid, Forget(stray))
            if self.cache.is_fed(stray):  # its feeder may write a little longer: delete again
                await store.register(uid, [stray])
                run.requeue_after(STRAY_S)
        if view.lost_agents and view.settled:
            await store.sweep_agents(uid)
        by_jobs = _publications(run.group, lambda job: decisions[job.metadata.uid].adapter)
        run.published, run.owners = published(endpoint, by_jobs, view.adapters), owners(endpoint, by_jobs)
        run.adapters = served(endpoint, run.published)
        if run.adapters != view.adapters:
            await store.set_adapters(uid, run.adapters.values())
        unsure = any(
            not decision.settled and not is_final(observations[job].job) for job, decision in decisions.items()
        )
        if view.incarnation is None and not unsure:
            await store.begin(uid)
        elif view.incarnation is None:
            run.requeue_after(RETRY_S)


def _surplus(run: Reconciliation) -> frozenset[str]:
    """Return the uids of the jobs that are too many for their agents."""
    if run.redis is None or run.group.endpoint is None:
        return frozenset()
    held: dict[str, list[Bound]] = {}
    for job in run.group.jobs:
        uid, record = job.metadata.uid, run.redis.jobs.get(job.metadata.uid)
        if record is not None and record.fence is not None and record.fence.agent and not is_final(job):
            held.setdefault(record.fence.agent, []).append(Bound(uid, job.spec.priority, created(job)))
    return surplus(held, run.group.endpoint.spec.finetuning.jobs)


def _kept_pods(run: Reconciliation) -> frozenset[str]:
    """Return the names of the pods that nobody takes away."""
    return frozenset(pod.name for pod in run.pods if not pod.deleting and not pod.disrupted)


def _publications(group: Group, adapter: Callable[[FinetuneJob], PublishedAdapter | None]) -> list[Publication | None]:
    """Return what the group's jobs have published, but for what the endpoint keeps by itself."""
    assert group.endpoint is not None
    return [*(publication(job, adapter(job)) for job in group.jobs), *group.finished.unrecorded(group.endpoint)]


def _checkpoints_left(group: Group) -> Callable[[str], ContinuedFrom | None]:
    """Return the look-up of the checkpoint that a job of a name has left."""
    living = {job.metadata.name: job for job in group.jobs}

    def left(name: str) -> ContinuedFrom | None:
        if name in living:
            return checkpoint_left(living[name])
        over = group.finished.by_name.get(name)
        return None if over is None else over.checkpoint

    return left


class _Faults:
    """Collects what went wrong in the parts of a pass."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._part = ""

    def check(self) -> None:
        """Raise what was collected."""
        if self.messages:
            raise ReconcileError("; ".join(self.messages))

    def of(self, part: str) -> "_Faults":
        self._part = part
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ConflictError):
            self.messages.append(f"{self._part} has changed meanwhile")
        elif isinstance(error, (KubeError, StoreError)):
            self.messages.append(f"{self._part}: {error}")
        else:
            return False
        return True
