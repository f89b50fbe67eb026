"""The endpoint's part of a pass: which agents are to go, the objects that it owns, and its status."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from coserve_api.endpoint import InferenceEndpoint
from coserve_contract.messages import AdapterRecord
from coserve_operator.apply.budget import LOAD, StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.hindrances import LISTEN_S, LOOK_AGAIN_S, Hindrances
from coserve_operator.apply.listener import Listener
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.apply.status import write_status
from coserve_operator.decide import endpoint_status as endpoints
from coserve_operator.decide.decision import Decision
from coserve_operator.decide.observed import Drift, Obstacle, PodView, RedisView, Unreadable
from coserve_operator.decide.published import Versions, greatest_rank, trained_rank
from coserve_operator.decide.rollout import jobs_at_start, needs_turn
from coserve_operator.decide.scale import Held, ScalePlan, plan_scale
from coserve_operator.decide.stores import TAKEN, overlap
from coserve_operator.kube import AUTOSCALER, DEPLOYMENT, ENDPOINT, POD, SECRET, Kube, Manifest, NotFoundError
from coserve_operator.manifests import agents
from coserve_operator.manifests import endpoint as owned
from coserve_operator.manifests.metadata import (
    BUILDER,
    DELETION_COST,
    IN_TURN,
    JOBS,
    LEAVING,
    MADE_FROM,
    digest_of,
    is_owned_by,
    secret_name,
    stamp,
)
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.tenants import RedisAccess
from coserve_operator.watch import views
from coserve_operator.watch.cache import Cache, Group

LEAST_COST = str(-(2**31))
CONFIG_ERROR = "CreateContainerConfigError"
"""What a kubelet says of a container that names a Secret which is not there."""
TURN_S = 5.0
"""How often an endpoint looks whether it is its turn."""


@dataclass
class Reconciliation:
    """One pass over a group, as it goes along."""

    namespace: str
    group: Group
    now: datetime
    redis: RedisView | None = None
    unreadable: Unreadable | None = None
    pods: tuple[PodView, ...] = ()
    scale: ScalePlan | None = None
    leaving_agents: frozenset[str] = frozenset()
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    published: Versions = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, AdapterRecord] = field(default_factory=dict)
    obstacles: dict[str, Obstacle] = field(default_factory=dict)
    """What keeps feeders from being made, by the job's uid."""
    requeue_after_s: float | None = None

    def requeue_after(self, delay_s: float | None) -> None:
        """Ask for the next pass in `delay_s` seconds at the latest."""
        if delay_s is not None:
            self.requeue_after_s = delay_s if self.requeue_after_s is None else min(self.requeue_after_s, delay_s)


@dataclass
class EndpointApplier:
    """Plans before the jobs are decided on (who is to go), and acts after."""

    settings: Settings
    kube: Kube
    stores: Stores
    cache: Cache
    applier: Applier
    budget: StatusBudget
    recorder: Recorder
    metrics_slot: MetricsSlotKeeper

    def __post_init__(self) -> None:
        self._builder = agents.builder(self.settings.agent_image, self.stores.reference(), self.settings.pod_defaults)
        self._listener = Listener(self.kube)
        self._taking: set[str] = set()
        """Uids of the endpoints whose turn began, and is not yet seen in the cache."""

    def plan(self, run: Reconciliation) -> None:
        """Decide on the scale, and so on the agents that must get no new job."""
        endpoint = run.group.endpoint
        assert endpoint is not None
        run.pods = tuple(views.pod_view(pod) for pod in run.group.pods)
        current, _, _ = views.deployment_counts(run.group.deployment)
        desired = endpoint.spec.replicas
        if run.redis is None and current is not None:
            run.scale = ScalePlan(max(desired, current))  # who holds which job is not known
        else:
            run.scale = plan_scale(desired, current, run.pods, _held(run), run.now.timestamp())
        run.requeue_after(run.scale.requeue_after_s)
        going = {pod.uid for pod in run.pods if pod.deleting or pod.name in run.scale.leaving}
        beats = run.redis.agents if run.redis is not None else {}
        run.leaving_agents = frozenset(agent for agent, beat in beats.items() if beat.pod_uid in going)

    async def act(self, run: Reconciliation) -> None:
        """Mark pods, apply what is owned, and write the status, also when something stood in the way."""
        endpoint, scale = run.group.endpoint, run.scale
        assert endpoint is not None
        assert scale is not None
        taken = overlap(endpoint, self.cache.around(endpoint)) if run.group.deployment is None else ""
        if taken:
            run.requeue_after(LOOK_AGAIN_S)
            await self._write_status(run, endpoint, Obstacle(TAKEN, taken), (), "")
            return
        hindrances = Hindrances()
        with hindrances:
            await self._mark_leaving(run, scale)
        template = await self._apply(run, endpoint, scale.replicas, hindrances)
        await self._listen(run)
        obstacle = hindrances.obstacle or views.replica_failure(run.group.deployment)
        if obstacle is not None:
            run.requeue_after(LOOK_AGAIN_S)
        drifts = self.applier.insisted(endpoint.metadata.uid)
        for drift in drifts:
            run.requeue_after(drift.wait_s or drift.calm_s)
        await self._write_status(run, endpoint, obstacle, drifts, template)
        hindrances.check()

    async def _listen(self, run: Reconciliation) -> None:
        """Ask why the pod that was first does not come along; what it waits for, the others do, too."""
        waiting = [pod for pod in run.pods if pod.creating_since is not None and not pod.deleting]
        if not waiting:
            return
        run.requeue_after(LISTEN_S)
        first = min(waiting, key=lambda pod: (pod.creating_since or 0.0, pod.name))
        trouble = await self._listener.of_pod(run.group.pods[0]["metadata"]["namespace"], first, run.now)
        run.pods = tuple(replace(pod, trouble=trouble) if pod is first else pod for pod in run.pods)

    async def _mark_leaving(self, run: Reconciliation, scale: ScalePlan) -> None:
        """Annotate the pods that are to go before the Deployment is lowered: the other way round another one may go."""
        namespace = run.group.pods[0]["metadata"]["namespace"] if run.group.pods else ""
        since = str(int(run.now.timestamp()))
        mark: dict[str, str | None] = {LEAVING: since, DELETION_COST: LEAST_COST}
        changes = [(pod, mark) for pod in scale.mark]
        changes += [(pod, {LEAVING: None, DELETION_COST: None}) for pod in scale.unmark]
        for pod, annotations in changes:
            try:
                written = await self.kube.merge(POD, namespace, pod, {"metadata": {"annotations": annotations}})
            except NotFoundError:
                continue
            self.cache.put(POD, written)

    async def _apply(
        self, run: Reconciliation, endpoint: InferenceEndpoint, replicas: int, hindrances: Hindrances
    ) -> str | None:
        """Apply everything as far as it can be; return the digest of the agents' template, None where it waits.

        The Deployment is not lowered before its pods are marked, nor made before what its pods need and are kept by.
        """
        uid, group, access = endpoint.metadata.uid, run.group, self._access(endpoint)
        self._look_for_secret(run, endpoint.metadata.namespace, secret_name(endpoint.metadata.name, access))
        manifests: list[Manifest] = [
            owned.service_account(endpoint),
            owned.redis_secret(endpoint, access),
            owned.service(endpoint),
            owned.disruption_budget(endpoint),
            owned.network_policy(endpoint, self.settings.namespace, access.url),
        ]
        marked = not hindrances
        for manifest in manifests:
            with hindrances:
                await self.applier.apply(manifest, uid)
        held = not marked or (bool(hindrances) and group.deployment is None)
        template = await self._apply_agents(run, endpoint, replicas, hindrances, held=held)
        with hindrances:
            await self._apply_autoscaler(endpoint, group)
        return template

    async def _apply_autoscaler(self, endpoint: InferenceEndpoint, group: Group) -> None:
        uid = endpoint.metadata.uid
        autoscaler = owned.autoscaler(endpoint) if self.metrics_slot.slot.obstacle is None else None
        if autoscaler is not None:
            await self.applier.apply(autoscaler, uid)
        elif group.autoscaler is not None and is_owned_by(group.autoscaler, uid):
            meta = group.autoscaler["metadata"]
            await self.kube.delete(AUTOSCALER, meta["namespace"], meta["name"], meta["uid"])
            self.applier.forget(AUTOSCALER.name, meta["namespace"], meta["name"])

    async def _apply_agents(
        self, run: Reconciliation, endpoint: InferenceEndpoint, replicas: int, hindrances: Hindrances, *, held: bool
    ) -> str | None:
        """Apply the Deployment, if it is not held back, and return the digest of its template. Where only a new version
        of ours would replace agents that serve, that has its turn: None until then.
        """
        meta, before = endpoint.metadata, views.rollout_view(run.group.deployment)
        rank = max(greatest_rank(run.published), trained_rank(run.group.jobs))
        made_from = digest_of(self._agents(endpoint, 0, 0, rank)["spec"]["template"])
        in_turn = needs_turn(made_from, self._builder, before)
        if in_turn and self._turns() >= self.settings.rollout_max_endpoints:
            run.requeue_after(TURN_S)
            existing = run.group.deployment
            if not held and existing is not None and existing["spec"].get("replicas") != replicas:
                change = {"spec": {"replicas": replicas}}
                with hindrances:
                    self.cache.put(DEPLOYMENT, await self.kube.merge(DEPLOYMENT, meta.namespace, meta.name, change))
            return None
        if before is not None and (before.made_from, before.builder) == (made_from, self._builder):
            in_turn = before.in_turn
        jobs = jobs_at_start(endpoint, made_from, before)
        manifest = self._agents(endpoint, replicas, jobs, rank)
        template = stamp(manifest)
        marks = {MADE_FROM: made_from, BUILDER: self._builder, JOBS: str(jobs)}
        manifest["metadata"]["annotations"] = marks | ({IN_TURN: "true"} if in_turn else {})
        if held:
            return template
        self._taking |= {meta.uid} if in_turn else set()
        try:
            with hindrances:
                sent = await self.applier.apply(manifest, meta.uid)
                if sent is not None:
                    self.cache.put(DEPLOYMENT, sent)
        finally:
            self._taking.discard(meta.uid)
        return template

    def _turns(self) -> int:
        """Return how many endpoints have theirs now."""
        return len(self._taking) + self.cache.rolling()

    def _agents(self, endpoint: InferenceEndpoint, replicas: int, jobs: int, least_rank: int) -> Manifest:
        image, defaults = self.settings.agent_image, self.settings.pod_defaults
        return agents.deployment(endpoint, replicas, image, self._access(endpoint), jobs, defaults, least_rank)

    def _access(self, endpoint: InferenceEndpoint) -> RedisAccess:
        return self.stores.access(endpoint.metadata.namespace, endpoint.metadata.uid)

    def _look_for_secret(self, run: Reconciliation, namespace: str, name: str) -> None:
        """Where a pod is not made for want of something that it names, the Secret may have been deleted: we may not
        read it, and so it is created again.
        """
        found = itertools.chain(run.group.pods, *run.group.feeder_pods.values())
        if any(trouble is not None and trouble[0] == CONFIG_ERROR for trouble in map(views.pod_trouble, found)):
            self.applier.forget(SECRET.name, namespace, name)

    async def _write_status(
        self,
        run: Reconciliation,
        endpoint: InferenceEndpoint,
        obstacle: Obstacle | None,
        drifts: tuple[Drift, ...],
        template: str | None,
    ) -> None:
        _, existing, ready = views.deployment_counts(run.group.deployment)
        observed = endpoints.ObservedEndpoint(
            endpoint=endpoint,
            pods=run.pods,
            replicas=existing,
            ready_replicas=ready,
            redis=run.redis,
            unreadable=run.unreadable,
            agent_jobs=_agent_jobs(run),
            published=run.published,
            owners=run.owners,
            adapters=run.adapters,
            autoscaler=views.autoscaler_report(run.group.autoscaler),
            autoscaler_obstacle=self.metrics_slot.slot.obstacle,
            obstacle=obstacle,
            drifts=drifts,
            template=template,
        )
        meta, new = endpoint.metadata, endpoints.status_of(observed, run.now)
        delay_s = self.budget.delay_s(meta.uid, endpoint.status.to_dict(), new.to_dict(), LOAD)
        if delay_s != 0.0:
            run.requeue_after(delay_s)
            return
        if await write_status(self.kube, self.cache, self.budget, ENDPOINT, meta, new.to_dict()):
            await self.recorder.record(ENDPOINT, meta, endpoints.events(endpoint.status, new), run.now)


def _held(run: Reconciliation) -> dict[str, list[Held]]:
    """Return the jobs that pods hold, by the pod's name, as Redis has them before this pass."""
    held: dict[str, list[Held]] = {}
    if run.redis is None:
        return held
    for uid, record in run.redis.jobs.items():
        beat = run.redis.agents.get(record.fence.agent) if record.fence is not None else None
        if beat is None:
            continue
        saved = record.checkpoint.step if record.checkpoint is not None else 0
        done = beat.jobs[uid].step if uid in beat.jobs else saved
        held.setdefault(beat.pod_name, []).append(Held(uid, max(0, done - saved)))
    return held


def _agent_jobs(run: Reconciliation) -> dict[str, list[str]]:
    names = {job.metadata.uid: job.metadata.name for job in run.group.jobs}
    bound: dict[str, list[str]] = {}
    for uid, decision in run.decisions.items():
        if decision.agent:
            bound.setdefault(decision.agent, []).append(names[uid])
    return bound
