"""The endpoint's part of a pass: which agents are to go, the objects that it owns, and its status."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.messages import AdapterRecord
from coserve_operator import views
from coserve_operator.apply import Applier, ForeignObjectError
from coserve_operator.budget import LOAD, LOAD_EVERY_S, StatusBudget
from coserve_operator.events import Recorder
from coserve_operator.kube import AUTOSCALER, DEPLOYMENT, ENDPOINT, POD, InvalidError, Kube, Manifest, NotFoundError
from coserve_operator.reconcile import endpoint as endpoints
from coserve_operator.reconcile.job import Verdict
from coserve_operator.reconcile.observed import PodView, RedisView
from coserve_operator.reconcile.scale import Held, ScalePlan, plan_scale
from coserve_operator.resources import agents
from coserve_operator.resources import endpoint as owned
from coserve_operator.resources.metadata import DELETION_COST, LEAVING, digest_of
from coserve_operator.settings import Settings
from coserve_operator.status import write_status
from coserve_operator.store import OperatorStore
from coserve_operator.world import Group, World

LEAST_COST = str(-(2**31))


@dataclass
class Pass:
    """One pass over a group, as it goes along."""

    group: Group
    now: datetime
    redis: RedisView | None = None
    pods: tuple[PodView, ...] = ()
    scale: ScalePlan | None = None
    leaving_agents: frozenset[str] = frozenset()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    adapters: Mapping[str, AdapterRecord] = field(default_factory=dict)
    again_in_s: float | None = None

    def look_again(self, delay_s: float | None) -> None:
        """Ask for the next pass in `delay_s` seconds at the latest."""
        if delay_s is not None:
            self.again_in_s = delay_s if self.again_in_s is None else min(self.again_in_s, delay_s)


@dataclass
class EndpointKeeper:
    """Plans before the jobs are decided on (who is to go), and acts after."""

    settings: Settings
    kube: Kube
    store: OperatorStore
    world: World
    applier: Applier
    budget: StatusBudget
    recorder: Recorder

    def plan(self, this: Pass) -> None:
        """Decide on the scale, and so on the agents that must get no new job."""
        endpoint = this.group.endpoint
        assert endpoint is not None
        this.pods = tuple(views.pod_view(pod) for pod in this.group.pods)
        current, _, _ = views.deployment_counts(this.group.deployment)
        desired = endpoint.spec.replicas
        if this.redis is None and current is not None:
            this.scale = ScalePlan(max(desired, current))  # who holds which job is not known
        else:
            this.scale = plan_scale(desired, current, this.pods, _held(this), this.now.timestamp())
        this.look_again(this.scale.again_in_s)
        going = {pod.uid for pod in this.pods if pod.deleting or pod.name in this.scale.leaving}
        beats = this.redis.agents if this.redis is not None else {}
        this.leaving_agents = frozenset(agent for agent, beat in beats.items() if beat.pod_uid in going)

    async def act(self, this: Pass) -> None:
        """Mark pods, apply what is owned, and write the status, also when something stood in the way."""
        endpoint, scale = this.group.endpoint, this.scale
        assert endpoint is not None
        assert scale is not None
        await self._mark(this, scale)
        obstacle: tuple[str, str] | None = None
        try:
            await self._apply(endpoint, scale.replicas, this.group)
        except ForeignObjectError as error:
            obstacle = ("NameTaken", str(error))
            this.look_again(30.0)
        except InvalidError as error:
            obstacle = ("Rejected", error.message)
            this.look_again(30.0)
        await self._tell(this, endpoint, obstacle)

    async def _mark(self, this: Pass, scale: ScalePlan) -> None:
        """Annotate the pods that are to go before the Deployment is lowered: the other way round another one may go."""
        namespace = this.group.pods[0]["metadata"]["namespace"] if this.group.pods else ""
        since = str(int(this.now.timestamp()))
        mark: dict[str, str | None] = {LEAVING: since, DELETION_COST: LEAST_COST}
        changes = [(pod, mark) for pod in scale.mark]
        changes += [(pod, {LEAVING: None, DELETION_COST: None}) for pod in scale.unmark]
        for pod, annotations in changes:
            try:
                written = await self.kube.merge(POD, namespace, pod, {"metadata": {"annotations": annotations}})
            except NotFoundError:
                continue
            self.world.put(POD, written)

    async def _apply(self, endpoint: InferenceEndpoint, replicas: int, group: Group) -> None:
        uid, redis_url = endpoint.metadata.uid, self.settings.redis_url_of_agents
        username, password = self.store.credentials(uid)
        image, secret_digest = self.settings.agent_image, digest_of(password)
        manifests: list[Manifest] = [
            owned.service_account(endpoint),
            owned.redis_secret(endpoint, username, password),
            owned.service(endpoint),
            owned.disruption_budget(endpoint),
            owned.network_policy(endpoint, self.settings.namespace, redis_url),
            agents.deployment(endpoint, replicas, image, redis_url, secret_digest),
        ]
        autoscaler = owned.autoscaler(endpoint)
        if autoscaler is not None:
            manifests.append(autoscaler)
        elif group.autoscaler is not None:
            meta = group.autoscaler["metadata"]
            await self.kube.delete(AUTOSCALER, meta["namespace"], meta["name"], meta["uid"])
            self.applier.forget(AUTOSCALER.name, meta["namespace"], meta["name"])
        if group.deployment is not None and group.deployment["spec"].get("replicas") != replicas:
            self.applier.forget(DEPLOYMENT.name, endpoint.metadata.namespace, endpoint.metadata.name)
        for manifest in manifests:
            sent = await self.applier.apply(manifest, uid)
            if sent is not None and manifest["kind"] == DEPLOYMENT.name:
                self.world.put(DEPLOYMENT, sent)

    async def _tell(self, this: Pass, endpoint: InferenceEndpoint, obstacle: tuple[str, str] | None) -> None:
        _, existing, ready = views.deployment_counts(this.group.deployment)
        sight = endpoints.EndpointSight(
            endpoint=endpoint,
            pods=this.pods,
            replicas=existing,
            ready_replicas=ready,
            redis=this.redis,
            agent_jobs=_agent_jobs(this),
            adapters=this.adapters,
            autoscaler=views.autoscaler_report(this.group.autoscaler),
            obstacle=obstacle,
        )
        meta, new = endpoint.metadata, endpoints.status_of(sight, this.now)
        delay_s = self.budget.delay_s(meta.uid, endpoint.status.to_dict(), new.to_dict(), LOAD, LOAD_EVERY_S)
        if delay_s != 0.0:
            this.look_again(delay_s)
            return
        if await write_status(self.kube, self.world, self.budget, ENDPOINT, meta, new.to_dict()):
            await self.recorder.tell(ENDPOINT, meta, endpoints.notices(endpoint.status, new), this.now)


def _held(this: Pass) -> dict[str, list[Held]]:
    """Return the jobs that pods hold, by the pod's name, as Redis has them before this pass."""
    held: dict[str, list[Held]] = {}
    if this.redis is None:
        return held
    for uid, record in this.redis.jobs.items():
        beat = this.redis.agents.get(record.fence.agent) if record.fence is not None else None
        if beat is None:
            continue
        saved = record.checkpoint.step if record.checkpoint is not None else 0
        done = beat.jobs[uid].step if uid in beat.jobs else saved
        held.setdefault(beat.pod_name, []).append(Held(uid, max(0, done - saved)))
    return held


def _agent_jobs(this: Pass) -> dict[str, list[str]]:
    names = {job.metadata.uid: job.metadata.name for job in this.group.jobs}
    bound: dict[str, list[str]] = {}
    for uid, verdict in this.verdicts.items():
        if verdict.agent:
            bound.setdefault(verdict.agent, []).append(names[uid])
    return bound
