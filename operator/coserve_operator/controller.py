"""One reconcile of a group: look, decide by the pure functions, then act, each status before anything in Redis.

A fault of one job does not keep the others from being served: faults are collected, and the group is tried again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from coserve_operator.apply import Applier, ForeignObjectError
from coserve_operator.budget import PROGRESS, PROGRESS_EVERY_S, StatusBudget
from coserve_operator.endpoints import EndpointKeeper, Pass
from coserve_operator.events import Recorder
from coserve_operator.feeders import FeederKeeper
from coserve_operator.kube import FINETUNE_JOB, ConflictError, InvalidError, Kube, KubeError
from coserve_operator.reconcile import job as jobs
from coserve_operator.reconcile import job_status
from coserve_operator.reconcile.job import Sight, Verdict, is_final
from coserve_operator.reconcile.observed import Notice, RedisView
from coserve_operator.reconcile.placement import Waiting, place
from coserve_operator.reconcile.published import next_number, published
from coserve_operator.reconcile.sources import continued_from
from coserve_operator.resources.feeder import inputs_digest
from coserve_operator.settings import Settings
from coserve_operator.status import write_status
from coserve_operator.store import OperatorStore, StoreError
from coserve_operator.views import feeder_view
from coserve_operator.world import Group, Name, World

logger = logging.getLogger(__name__)

RETRY_S = 1.0
STRAY_S = 10.0


class ReconcileError(Exception):
    """Something of a group could not be done now; what could be done was."""


@dataclass
class Controller:
    """Reconciles groups. `now` is the time of day; all that lasts is in the API server and in Redis."""

    settings: Settings
    kube: Kube
    store: OperatorStore
    world: World
    applier: Applier
    budget: StatusBudget
    recorder: Recorder
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self._endpoints = EndpointKeeper(
            self.settings, self.kube, self.store, self.world, self.applier, self.budget, self.recorder
        )
        self._feeders = FeederKeeper(self.settings, self.kube)
        self._refused: dict[str, str] = {}

    async def reconcile(self, name: Name) -> float | None:
        """Bring one group forward; return in how many seconds to look again, None when only a change is a reason to."""
        group, now, faults = self.world.group(name), self.now(), _Faults()
        this = Pass(group, now)
        if group.endpoint is not None:
            this.redis = await self._look(group, faults)
            self._endpoints.plan(this)
        sights = self._sights(this)
        verdicts = self._decide(sights, this)
        for job in group.jobs:
            sight, verdict = sights[job.metadata.uid], verdicts[job.metadata.uid]
            with faults.of(f"FinetuneJob {job.metadata.name}"):
                await self._act(sight, verdict, this)
        if group.endpoint is not None:
            this.verdicts = verdicts
            with faults.of("Redis"):
                await self._tidy(this, sights, verdicts)
            with faults.of(f"InferenceEndpoint {name[1]}"):
                await self._endpoints.act(this)
        if faults.messages:
            raise ReconcileError("; ".join(faults.messages))
        return this.again_in_s

    async def _look(self, group: Group, faults: "_Faults") -> RedisView | None:
        assert group.endpoint is not None
        uid = group.endpoint.metadata.uid
        view: RedisView | None = None
        with faults.of("Redis"):
            await self.store.assert_user(uid)
            view = (await self.store.read({uid: [job.metadata.uid for job in group.jobs]}))[uid]
            for error in view.broken:
                logger.warning("%s", error)
        return view

    def _sights(self, this: Pass) -> dict[str, Sight]:
        group, endpoint = this.group, this.group.endpoint
        live = [job for job in group.jobs if not is_final(job)]
        in_redis = this.redis.adapters if this.redis is not None else {}
        known = {}
        if endpoint is not None:
            known = published(endpoint, [(job, job.status.adapter) for job in group.jobs], in_redis)
        sights = {}
        for job in group.jobs:
            name, feeder = job.metadata.name, group.feeders.get(job.metadata.name)
            if feeder is not None and not self._feeders.owns(job, feeder):
                feeder = None
            sights[job.metadata.uid] = Sight(
                job=job,
                endpoint=endpoint,
                rivals=tuple(each for each in live if each.metadata.uid != job.metadata.uid),
                redis=this.redis,
                feeder=feeder_view(feeder, group.feeder_pods.get(name, ())) if feeder is not None else None,
                feeder_inputs=inputs_digest(job, endpoint) if endpoint is not None else "",
                leaving=this.leaving_agents,
                adapter_number=next_number(job.spec.adapter.name, endpoint, known) if endpoint is not None else 1,
                source=continued_from(job, endpoint, known) if endpoint is not None else None,
            )
        return sights

    @staticmethod
    def _decide(sights: dict[str, Sight], this: Pass) -> dict[str, Verdict]:
        verdicts = {uid: jobs.assess(sight, this.now) for uid, sight in sights.items()}
        waiting = [
            Waiting(uid, (sights[uid].job.metadata.creation_timestamp or "", sights[uid].job.metadata.name))
            for uid, verdict in verdicts.items()
            if verdict.wants_agent
        ]
        agents = this.redis.agents if this.redis is not None else {}
        bound = {uid: verdict.agent for uid, verdict in verdicts.items() if verdict.agent}
        placed = place(waiting, agents, bound, this.leaving_agents)
        queue = sorted((each for each in waiting if each.uid not in placed), key=lambda each: each.created)
        places = {each.uid: number for number, each in enumerate(queue, 1)}
        return {
            uid: jobs.give(sights[uid], verdict, agents, placed.get(uid), places.get(uid, 0))
            for uid, verdict in verdicts.items()
        }

    async def _act(self, sight: Sight, verdict: Verdict, this: Pass) -> None:
        """Write the status of one job; then, and only then, tell Redis and the feeder."""
        job = sight.job
        this.look_again(verdict.again_in_s)
        new = job_status.status_of(sight, verdict, this.now)
        delay_s = self.budget.delay_s(job.metadata.uid, job.status.to_dict(), new.to_dict(), PROGRESS, PROGRESS_EVERY_S)
        if delay_s == 0.0:
            if not await write_status(self.kube, self.world, self.budget, FINETUNE_JOB, job.metadata, new.to_dict()):
                return
            await self.recorder.tell(FINETUNE_JOB, job.metadata, job_status.notices(sight, verdict, new), this.now)
        else:
            this.look_again(delay_s)
        if sight.endpoint is not None and sight.redis is not None:
            for action in verdict.actions:
                answer = await self.store.do(sight.endpoint.metadata.uid, action)
                if answer is not None:
                    logger.info("%s %s: %s %s", job.metadata.name, type(action).__name__, verdict.reason, answer)
                    this.look_again(RETRY_S)
        try:
            await self._feeders.act(sight, verdict, this.group.feeders.get(job.metadata.name))
        except InvalidError as error:  # a quota, an admission policy: the user must hear of it, once
            if self._refused.get(job.metadata.uid) != error.message:
                self._refused[job.metadata.uid] = error.message
                refused = Notice("FeederRejected", error.message, warning=True)
                await self.recorder.tell(FINETUNE_JOB, job.metadata, [refused], this.now)
            raise

    async def _tidy(self, this: Pass, sights: dict[str, Sight], verdicts: dict[str, Verdict]) -> None:
        """Keep the index of jobs, drop what deleted jobs left, and begin a new incarnation once all is in Redis."""
        endpoint, view = this.group.endpoint, this.redis
        assert endpoint is not None
        if view is None:
            return
        uid = endpoint.metadata.uid
        fed = {job for job, sight in sights.items() if not is_final(sight.job)}
        if fed - view.known_jobs:
            await self.store.register(uid, sorted(fed - view.known_jobs))
        for stray in view.known_jobs - sights.keys():
            await self.store.do(uid, jobs.Forget(stray))
            if stray in this.group.fed_jobs:  # its feeder may write a little longer: delete again
                await self.store.register(uid, [stray])
                this.look_again(STRAY_S)
        if view.lost_agents and view.settled:
            await self.store.sweep_agents(uid)
        adapters = [(sight.job, verdicts[job].adapter) for job, sight in sights.items()]
        this.adapters = published(endpoint, adapters, view.adapters)
        if this.adapters != view.adapters:
            await self.store.set_adapters(uid, this.adapters.values())
        unsure = any(not verdict.settled and not is_final(sights[job].job) for job, verdict in verdicts.items())
        if view.incarnation is None and not unsure:
            await self.store.begin(uid)
        elif view.incarnation is None:
            this.look_again(RETRY_S)


class _Faults:
    """Collects what went wrong in the parts of a pass."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._part = ""

    def of(self, part: str) -> "_Faults":
        self._part = part
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ConflictError):
            self.messages.append(f"{self._part} has changed meanwhile")
        elif isinstance(error, (KubeError, StoreError, ForeignObjectError)):
            self.messages.append(f"{self._part}: {error}")
        else:
            return False
        return True
