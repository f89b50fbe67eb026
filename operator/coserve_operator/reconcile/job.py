"""What becomes of a FinetuneJob: a verdict on where it stands, then, once agents were given out, what to write and do.

The order is always the status first, then Redis: after a crash between the two the next pass sees an epoch in status
that Redis does not have, and binds under a higher one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from coserve_api.conditions import find_condition
from coserve_api.endpoint import FinetuningPolicy, InferenceEndpoint
from coserve_api.job import FailedReason, FinetuneJob, PendingReason, PublishPolicy
from coserve_api.job_status import ContinuedFrom, JobCondition, JobState, PublishedAdapter
from coserve_api.messages import Binding, Completed, Desired, Failed, Heartbeat, Released
from coserve_api.store import JobRecord
from coserve_api.uris import artifact_uri
from coserve_operator.reconcile import checks
from coserve_operator.reconcile.briefing import binding_of
from coserve_operator.reconcile.observed import FeederView, RedisView

STOP_LIMIT_S = 60.0
"""How long a living agent may take to give back a job that is to stop; then its right to write ends."""


@dataclass(frozen=True, slots=True)
class Bind:
    """Give the job to an agent under the binding's epoch; under an epoch that Redis lost, give it again."""

    job_uid: str
    agent: str
    binding: Binding


@dataclass(frozen=True, slots=True)
class Rebrief:
    """Tell the bound agent something else under the same epoch."""

    job_uid: str
    agent: str
    binding: Binding


@dataclass(frozen=True, slots=True)
class Unbind:
    """Leave the job to nobody."""

    job_uid: str
    agent: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete what Redis holds of the job."""

    job_uid: str


RedisAction = Bind | Rebrief | Unbind | Forget


class FeederWish(StrEnum):
    """What should be with the feeder."""

    KEEP = "keep"
    RUN = "run"
    SUSPEND = "suspend"
    RENEW = "renew"


@dataclass(frozen=True, slots=True)
class Sight:
    """Everything that a verdict on `job` is made from. `leaving` holds the ids of agents that are to go, `source` is
    the adapter that the job goes on from, once it is known.
    """

    job: FinetuneJob
    endpoint: InferenceEndpoint | None
    rivals: Sequence[FinetuneJob] = ()
    redis: RedisView | None = None
    feeder: FeederView | None = None
    feeder_inputs: str = ""
    leaving: frozenset[str] = frozenset()
    adapter_number: int = 1
    source: ContinuedFrom | None = None

    @property
    def record(self) -> JobRecord:
        """What Redis knows of the job; nothing is known without Redis."""
        return (self.redis.jobs.get(self.job.metadata.uid) if self.redis else None) or JobRecord()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a job stands. With `wants_agent` it takes part in the placement; `epoch` is the highest ever used."""

    state: JobState
    reason: str
    message: str = ""
    epoch: int = 0
    agent: str = ""
    pod: str = ""
    node: str = ""
    training: bool = False
    wants_agent: bool = False
    restarts: int = 0
    adapter: PublishedAdapter | None = None
    published: tuple[bool, str, str] | None = None
    actions: tuple[RedisAction, ...] = ()
    feeder: FeederWish = FeederWish.KEEP
    again_in_s: float | None = None
    settled: bool = True
    """False: the status stays as it is, since the job is over or too little is known."""

    @property
    def is_final(self) -> bool:
        """Return whether nothing will change any more."""
        return self.state in (JobState.COMPLETE, JobState.FAILED)


def is_final(job: FinetuneJob) -> bool:
    """Return whether the status says that the job is over."""
    ends = (find_condition(job.status.conditions, each) for each in (JobCondition.COMPLETE, JobCondition.FAILED))
    return any(end is not None and end.status == "True" for end in ends)


def assess(sight: Sight, now: datetime) -> Verdict:
    """Return the verdict on a job. Of several reasons to wait, one that a user can do something about is named."""
    job, status, record = sight.job, sight.job.status, sight.record
    if is_final(job):
        return _over(sight)
    base = Verdict(
        JobState.PENDING,
        PendingReason.WAITING_FOR_DATA,
        epoch=max(status.binding.epoch if status.binding else 0, record.fence.epoch if record.fence else 0),
        restarts=status.restarts,
        adapter=status.adapter,
    )
    if sight.endpoint is None:
        return _no_endpoint(sight, base)
    if status.start_time is None:
        refused = checks.refusal(job, sight.endpoint, sight.rivals)
        if refused is not None:
            return _end(sight, base, *refused)
    astray = checks.checkpoint_astray(job, sight.endpoint)
    if astray is not None:
        return _end(sight, base, *astray)
    if sight.redis is None:
        return replace(base, settled=False)
    if status.adapter is not None or isinstance(record.result, Completed):
        return _completed(sight, base, sight.endpoint, sight.redis)
    if isinstance(record.result, Failed):
        return _end(sight, base, record.result.reason, record.result.message)
    broken_data = checks.data_failure(record.feed, sight.feeder)
    if broken_data is not None:
        return _end(sight, base, *broken_data)
    return _live(sight, replace(base, feeder=_feeder_wish(sight)), sight.endpoint, sight.redis, now)


def _live(sight: Sight, base: Verdict, endpoint: InferenceEndpoint, redis: RedisView, now: datetime) -> Verdict:
    """Return the verdict on a job that is to be trained: bound, lost, given back or waiting."""
    status, record, uid = sight.job.status, sight.record, sight.job.metadata.uid
    named = status.binding.agent if status.binding else ""
    fence = record.fence
    released = isinstance(record.result, Released)
    if named and status.binding is not None:
        if fence is not None and fence.epoch == status.binding.epoch and fence.agent and not released:
            if fence.agent in redis.agents:
                return _bound(sight, base, endpoint, redis, fence.agent, now)
            return _lost(sight, base, endpoint, redis)
        if fence is None:  # Redis was emptied, or we stopped between the status and the first binding
            agent = _agent_with(redis.agents, named, uid, status.binding.epoch)
            if agent is not None:
                return _bound(sight, base, endpoint, redis, agent, now)
            if all(beat.pod_name != named for beat in redis.agents.values()):
                return _lost(sight, base, endpoint, redis)
    unbind = (Unbind(uid, fence.agent, fence.epoch),) if fence is not None and fence.agent else ()
    return _unbound(sight, replace(base, actions=unbind), endpoint)


def _bound(
    sight: Sight, base: Verdict, endpoint: InferenceEndpoint, redis: RedisView, agent: str, now: datetime
) -> Verdict:
    """Return the verdict on a job whose agent lives: it trains, or is asked to give the job back."""
    uid, beat = sight.job.metadata.uid, redis.agents[agent]
    running = beat.jobs.get(uid)
    training = running is not None and running.epoch == base.epoch
    stop = _stop_reason(sight, endpoint, agent)
    verdict = replace(
        base,
        state=JobState.RUNNING,
        reason=stop or ("Training" if training else "Starting"),
        message=f"on agent {beat.pod_name}",
        agent=agent,
        pod=beat.pod_name,
        node=beat.node,
        training=training and stop is None,
    )
    told = redis.bindings.get(uid)
    desired = Desired.STOP if stop else Desired.RUN
    binding = _binding(sight, endpoint, base.epoch, desired, base.restarts)
    if sight.record.fence is None:
        return replace(verdict, actions=(Bind(uid, agent, binding),))
    if told is None or told.desired != desired or told.epoch != base.epoch:
        verdict = replace(verdict, actions=(Rebrief(uid, agent, binding),))
    if stop is None:
        return verdict
    was_running = find_condition(sight.job.status.conditions, JobCondition.RUNNING)
    if was_running is None or was_running.status == "True" or was_running.reason != stop:
        return replace(verdict, again_in_s=STOP_LIMIT_S)
    since = datetime.fromisoformat(was_running.last_transition_time)
    left_s = STOP_LIMIT_S - (now - since) / timedelta(seconds=1)
    if left_s > 0:
        return replace(verdict, again_in_s=left_s)
    return _unbound(sight, replace(base, actions=(Unbind(uid, agent, base.epoch),)), endpoint)


def _stop_reason(sight: Sight, endpoint: InferenceEndpoint, agent: str) -> str | None:
    if sight.job.spec.suspend:
        return "Suspending"
    if endpoint.spec.finetuning.policy is FinetuningPolicy.DISABLED:
        return "FinetuningDisabled"
    return "Moving" if agent in sight.leaving else None


def _lost(sight: Sight, base: Verdict, endpoint: InferenceEndpoint, redis: RedisView) -> Verdict:
    """Return the verdict on a job whose agent has no heartbeat: after some patience it is counted and goes on."""
    if not redis.settled:
        return replace(base, settled=False, again_in_s=1.0)
    restarts, limit = base.restarts + 1, sight.job.spec.backoff_limit
    if restarts > limit:
        message = f"the agent was lost {restarts} times, and spec.backoffLimit is {limit}; see its pod's events and log"
        return _end(sight, replace(base, restarts=restarts), FailedReason.BACKOFF_LIMIT_EXCEEDED, message)
    fence = sight.record.fence
    unbind = (Unbind(sight.job.metadata.uid, fence.agent, fence.epoch),) if fence and fence.agent else ()
    return _unbound(sight, replace(base, restarts=restarts, actions=unbind), endpoint)


def _unbound(sight: Sight, base: Verdict, endpoint: InferenceEndpoint) -> Verdict:
    """Return the verdict on a job that nobody runs."""
    if sight.job.spec.suspend:
        return replace(base, state=JobState.SUSPENDED, reason="Suspended", message="spec.suspend is true")
    if endpoint.spec.finetuning.policy is FinetuningPolicy.DISABLED:
        message = f"endpoint {endpoint.metadata.name} has spec.finetuning.policy Disabled; set it to Allowed"
        return replace(base, reason=PendingReason.FINETUNING_DISABLED, message=message)
    missing = checks.source_missing(sight.job, endpoint, sight.source)
    if missing is not None:
        return replace(base, reason=PendingReason.ADAPTER_NOT_FOUND, message=missing)
    feed = sight.record.feed
    if feed is None or feed.total_steps == 0:
        trouble = sight.feeder.trouble if sight.feeder else None
        message = "the feeder reads the data set" if trouble is None else f"the feeder cannot start: {trouble[1]}"
        return replace(base, reason=PendingReason.WAITING_FOR_DATA, message=message)
    return replace(base, reason=PendingReason.NO_CAPACITY, wants_agent=True)


def give(sight: Sight, verdict: Verdict, agents: Mapping[str, Heartbeat], agent: str | None, place: int) -> Verdict:
    """Return the verdict after the placement: bound anew to `agent`, or, with None, `place`-th in the queue."""
    if not verdict.wants_agent:
        return verdict
    if agent is None or sight.endpoint is None:
        ready = sum(beat.ready and not beat.draining for beat in agents.values())
        message = f"number {place} in the queue: {ready} ready agent{'' if ready == 1 else 's'}, none with room"
        return replace(verdict, message=message)
    epoch, beat = verdict.epoch + 1, agents[agent]
    binding = _binding(sight, sight.endpoint, epoch, Desired.RUN, verdict.restarts)
    return replace(
        verdict,
        state=JobState.RUNNING,
        reason="Starting",
        message=f"on agent {beat.pod_name}",
        wants_agent=False,
        epoch=epoch,
        agent=agent,
        pod=beat.pod_name,
        node=beat.node,
        actions=(Bind(sight.job.metadata.uid, agent, binding),),
    )


def _binding(sight: Sight, endpoint: InferenceEndpoint, epoch: int, desired: Desired, restarts: int) -> Binding:
    number, record, source = sight.adapter_number, sight.record, sight.source
    return binding_of(sight.job, endpoint, epoch, desired, number, restarts, record, source)


def _completed(sight: Sight, base: Verdict, endpoint: InferenceEndpoint, redis: RedisView) -> Verdict:
    """Return the verdict on a trained job: complete, once every ready agent serves the adapter."""
    result, spec = sight.record.result, sight.job.spec
    adapter = sight.job.status.adapter
    done = replace(
        base, state=JobState.COMPLETE, reason="Completed", actions=_dismissal(sight), feeder=FeederWish.SUSPEND
    )
    if isinstance(result, Completed):
        done = replace(done, message=checks.ended_early(result, sight.record.feed))
    if adapter is None and isinstance(result, Completed) and result.adapter is not None:
        files = result.adapter
        uri = artifact_uri(endpoint.spec.artifact_store.uri, files.path)
        sha256, rank = files.sha256, result.rank
        adapter = PublishedAdapter(name=files.name, version=files.number, uri=uri, sha256=sha256, rank=rank)
    if spec.publish.policy is PublishPolicy.NEVER:
        return replace(done, published=(False, "NotRequested", "spec.publish.policy is Never"))
    if adapter is None and spec.publish.policy in checks.NOT_IMPROVED:
        message = f"spec.publish.policy is {spec.publish.policy}, and {checks.NOT_IMPROVED[spec.publish.policy]}"
        return replace(done, published=(False, "NotImproved", message))
    if adapter is None:
        message = "the agent finished without an adapter; this is a fault of the agent: see its log"
        return _end(sight, base, FailedReason.INTERNAL_ERROR, message)
    done = replace(done, adapter=adapter)
    ready = [beat for beat in redis.agents.values() if beat.ready]
    missing = [beat.pod_name for beat in ready if beat.adapters.get(adapter.name, 0) < adapter.version]
    if ready and not missing:
        message = f"{len(ready)} ready agents serve {adapter.name} version {adapter.version}"
        return replace(done, published=(True, "Published", message))
    served = f"{len(ready) - len(missing)} of {len(ready)} ready agents serve it" + (
        f"; waiting for {', '.join(sorted(missing)[:5])}" if missing else ""
    )
    told = (False, "Publishing", served)
    return replace(done, state=JobState.RUNNING, reason="Publishing", message=served, published=told)


def _no_endpoint(sight: Sight, base: Verdict) -> Verdict:
    name = sight.job.spec.endpoint_ref.name
    message = (
        f"there is no InferenceEndpoint {name} in namespace {sight.job.metadata.namespace}: create it or name another"
    )
    return replace(base, reason=PendingReason.ENDPOINT_NOT_FOUND, message=message, feeder=FeederWish.SUSPEND)


def _end(sight: Sight, base: Verdict, reason: FailedReason, message: str) -> Verdict:
    return replace(
        base,
        state=JobState.FAILED,
        reason=reason,
        message=message,
        actions=_dismissal(sight),
        feeder=FeederWish.SUSPEND,
    )


def _over(sight: Sight) -> Verdict:
    """Return the verdict on a job that ended before: nobody runs it, and Redis forgets it."""
    status, uid = sight.job.status, sight.job.metadata.uid
    feeding = sight.feeder is not None and sight.feeder.active
    known = sight.redis is not None and uid in sight.redis.known_jobs and not feeding
    return Verdict(
        status.state or JobState.COMPLETE,
        status.reason or "",
        epoch=status.binding.epoch if status.binding else 0,
        restarts=status.restarts,
        adapter=status.adapter,
        actions=(*_dismissal(sight), Forget(uid)) if known else (),
        feeder=FeederWish.SUSPEND,
        settled=False,
    )


def _dismissal(sight: Sight) -> tuple[RedisAction, ...]:
    fence = sight.record.fence
    return (Unbind(sight.job.metadata.uid, fence.agent, fence.epoch),) if fence is not None and fence.agent else ()


def _feeder_wish(sight: Sight) -> FeederWish:
    """Return what to do about the feeder. One whose work is lost, or that read something else, is made anew."""
    if sight.job.spec.suspend:
        return FeederWish.SUSPEND
    feeder = sight.feeder
    if feeder is not None and feeder.inputs != sight.feeder_inputs:
        return FeederWish.RENEW
    if feeder is not None and feeder.finished and feeder.failure is None:
        feed = sight.record.feed
        if feed is None or sight.record.last_shard < feed.total_steps:
            return FeederWish.RENEW
    return FeederWish.RUN


def _agent_with(agents: Mapping[str, Heartbeat], pod: str, job_uid: str, epoch: int) -> str | None:
    """Return the agent of `pod` that says it runs the job under `epoch`."""
    for agent, beat in agents.items():
        running = beat.jobs.get(job_uid)
        if beat.pod_name == pod and running is not None and running.epoch == epoch:
            return agent
    return None
