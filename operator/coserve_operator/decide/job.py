"""What becomes of a FinetuneJob: a decision on where it stands, then, once agents were given out, what to write and do.

The order is always the status first, then Redis: after a crash between the two the next pass sees an epoch in status
that Redis does not have, and binds under a higher one.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from coserve_api.conditions import find_condition
from coserve_api.endpoint import FinetuningPolicy, InferenceEndpoint
from coserve_api.job import PublishPolicy
from coserve_api.job_status import (
    FailedReason,
    JobCondition,
    JobState,
    PendingReason,
    PublishedAdapter,
)
from coserve_api.uris import artifact_uri
from coserve_contract.backoff import COUNTED
from coserve_contract.messages import Binding, Completed, Desired, Failed, Heartbeat, Released
from coserve_operator.decide import backoff, checks, lifetime
from coserve_operator.decide.actions import Bind, FeederAction, Forget, RedisAction, Unbind, UpdateBinding
from coserve_operator.decide.adapter_status import failure
from coserve_operator.decide.binding import binding_of
from coserve_operator.decide.decision import Decision, ObservedJob, is_final
from coserve_operator.decide.observed import RedisView

RENEW_AFTER_S = 60.0
"""How long after a feeder gave up another is made; nothing that a job waits for takes longer to be looked at again."""
STOP_LIMIT_S = 60.0
"""How long a living agent may take to give back a job that is to stop; then its right to write ends."""
LOAD_TRIES = 3
"""How often each agent that lacks a published version must have tried to load it before its job is over without."""


def decide(observed: ObservedJob, now: datetime) -> Decision:
    """Return the decision on a job. Of several reasons to wait, one that a user can do something about is named."""
    job = observed.job
    if is_final(job):
        return _over(observed)
    if job.metadata.deletion_timestamp is not None:
        return _going(observed)
    decision, left_s = _decide(observed, now), lifetime.deadline_left_s(job, now)
    trained = decision.is_final or decision.published is not None
    if left_s is None or trained or not decision.settled:
        return decision
    if left_s > 0:
        return replace(decision, requeue_after_s=min(left_s, decision.requeue_after_s or left_s))
    nobody = replace(decision, agent="", pod="", node="", training=False, wants_agent=False, requeue_after_s=None)
    return _end(observed, nobody, FailedReason.DEADLINE_EXCEEDED, lifetime.deadline_message(job))


def _decide(observed: ObservedJob, now: datetime) -> Decision:
    """Return the decision on a job that is not over, as long as it has time."""
    job, status, record = observed.job, observed.job.status, observed.record
    base = Decision(
        JobState.PENDING,
        PendingReason.WAITING_FOR_DATA,
        epoch=max(status.binding.epoch if status.binding else 0, record.fence.epoch if record.fence else 0),
        restarts=status.restarts,
        backoff=backoff.kept(job, record.checkpoint),
        adapter=status.adapter,
    )
    if observed.endpoint is None:
        return _no_endpoint(observed, base)
    if status.start_time is None and not job.spec.suspend:
        obstacle = checks.obstacle(job, observed.endpoint, observed.claims)
        if obstacle is not None:
            return replace(base, reason=obstacle[0], message=obstacle[1], feeder=FeederAction.SUSPEND)
    elsewhere = checks.checkpoint_elsewhere(job, observed.endpoint)
    if elsewhere is not None:
        return replace(base, reason=elsewhere[0], message=elsewhere[1], feeder=FeederAction.SUSPEND)
    if observed.redis is None:
        return _without_redis(observed, base)
    if status.adapter is not None or isinstance(record.result, Completed):
        return _completed(observed, base, observed.endpoint, observed.redis)
    if isinstance(record.result, Failed):
        return _end(observed, base, record.result.reason, record.result.message)
    broken_data = checks.data_failure(record.feed, observed.feeder)
    if broken_data is not None:
        return _end(observed, base, *broken_data)
    feeder = _feeder_action(observed, now)
    failed = observed.feeder is not None and observed.feeder.failure is not None
    waits_s = RENEW_AFTER_S if failed and feeder is not FeederAction.RENEW else None
    return _live(
        observed, replace(base, feeder=feeder, requeue_after_s=waits_s), observed.endpoint, observed.redis, now
    )


def _without_redis(observed: ObservedJob, base: Decision) -> Decision:
    """Return the decision on a job of which Redis tells nothing. One that was decided on before stays as it is: what
    runs goes on, and the endpoint's condition RedisReady tells of the others.
    """
    status = observed.job.status
    if status.observed_generation or status.start_time is not None:
        return replace(base, settled=False)
    why = observed.unreadable.message if observed.unreadable is not None else "it has not been read yet"
    message = f"what Redis holds of endpoint {observed.job.spec.endpoint_ref.name} is not known: {why}"
    return replace(base, reason=PendingReason.REDIS_UNAVAILABLE, message=message)


def _live(
    observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, redis: RedisView, now: datetime
) -> Decision:
    """Return the decision on a job that is to be trained: bound, lost, given back or waiting."""
    status, record, uid = observed.job.status, observed.record, observed.job.metadata.uid
    named = status.binding.agent if status.binding else ""
    fence = record.fence
    released = record.result if isinstance(record.result, Released) else None
    if named and status.binding is not None:
        if fence is not None and fence.epoch == status.binding.epoch and fence.agent and released is None:
            if fence.agent in redis.agents:
                return _bound(observed, base, endpoint, redis, fence.agent, now)
            return _lost(observed, base, endpoint, redis, now)
        if released is not None and released.reason is not None and released.epoch == status.binding.epoch:
            reason, counts = released.reason, released.reason in COUNTED
            fault = backoff.Fault(reason, f"agent {named}: {released.message}", counts)
            return _again(observed, base, endpoint, fault, now)
        if fence is None:  # Redis was emptied, or we stopped between the status and the first binding
            agent = redis.agent_with(named, uid, status.binding.epoch)
            if agent is not None:
                return _bound(observed, base, endpoint, redis, agent, now)
            if all(beat.pod_name != named for beat in redis.agents.values()):
                return _lost(observed, base, endpoint, redis, now)
    return _unbound(observed, replace(base, actions=_dismissal(observed)), endpoint, now)


def _bound(
    observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, redis: RedisView, agent: str, now: datetime
) -> Decision:
    """Return the decision on a job whose agent lives: it trains, or is asked to give the job back."""
    uid, beat = observed.job.metadata.uid, redis.agents[agent]
    running = beat.jobs.get(uid)
    training = running is not None and running.epoch == base.epoch
    stop = _stop_reason(observed, endpoint, agent)
    decision = replace(
        base,
        state=JobState.RUNNING,
        reason=stop or ("Training" if training else "Starting"),
        message=f"on agent {beat.pod_name}" + (f"; {observed.obstacle.message}" if observed.obstacle else ""),
        agent=agent,
        pod=beat.pod_name,
        node=beat.node,
        training=training and stop is None,
    )
    told = redis.bindings.get(uid)
    desired = Desired.STOP if stop else Desired.RUN
    binding = _binding(observed, endpoint, base.epoch, desired, base.restarts)
    if observed.record.fence is None:
        return replace(decision, actions=(Bind(uid, agent, binding),))
    changed = told is None or (told.epoch, told.desired, told.spec.live) != (base.epoch, desired, binding.spec.live)
    if changed:
        decision = replace(decision, actions=(UpdateBinding(uid, agent, binding),))
    if stop is None:
        return decision
    was_running = find_condition(observed.job.status.conditions, JobCondition.RUNNING)
    if was_running is None or was_running.status == "True" or was_running.reason != stop:
        return replace(decision, requeue_after_s=STOP_LIMIT_S)
    since = datetime.fromisoformat(was_running.last_transition_time)
    left_s = STOP_LIMIT_S - (now - since) / timedelta(seconds=1)
    if left_s > 0:
        return replace(decision, requeue_after_s=left_s)
    return _unbound(observed, replace(base, actions=(Unbind(uid, agent, base.epoch),)), endpoint, now)


def _stop_reason(observed: ObservedJob, endpoint: InferenceEndpoint, agent: str) -> str | None:
    if observed.job.spec.suspend:
        return "Suspending"
    if endpoint.spec.finetuning.policy is FinetuningPolicy.DISABLED:
        return "FinetuningDisabled"
    if observed.surplus:
        return "FewerJobs"
    return "Moving" if agent in observed.leaving else None


def _lost(
    observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, redis: RedisView, now: datetime
) -> Decision:
    """Return the decision on a job whose agent has no heartbeat: after some patience it goes on elsewhere."""
    if not redis.settled:
        return replace(base, settled=False, requeue_after_s=1.0)
    pod = observed.job.status.binding.agent if observed.job.status.binding else "?"
    why = "its pod was taken away" if observed.disrupted else "see its pod's events and log"
    fault = backoff.Fault("AgentLost", f"agent {pod} was lost: {why}", not observed.disrupted)
    return _again(observed, replace(base, restarts=base.restarts + 1), endpoint, fault, now)


def _again(
    observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, fault: backoff.Fault, now: datetime
) -> Decision:
    """Return the decision on a job that met a fault: it is tried again, unless that was done often enough."""
    faults = backoff.after(observed.job, observed.record.checkpoint, base.backoff, fault, now)
    base, enough = replace(base, backoff=faults), backoff.exhausted(faults, observed.job)
    if enough is not None:
        return _end(observed, base, FailedReason.BACKOFF_LIMIT_EXCEEDED, enough)
    return _unbound(observed, replace(base, actions=_dismissal(observed)), endpoint, now)


def _unbound(observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, now: datetime) -> Decision:
    """Return the decision on a job that nobody runs."""
    if observed.job.spec.suspend:
        return replace(base, state=JobState.SUSPENDED, reason="Suspended", message="spec.suspend is true")
    if endpoint.spec.finetuning.policy is FinetuningPolicy.DISABLED:
        message = f"endpoint {endpoint.metadata.name} has spec.finetuning.policy Disabled; set it to Allowed"
        return replace(base, reason=PendingReason.FINETUNING_DISABLED, message=message)
    left_s = backoff.left_s(base.backoff, now)
    if base.backoff is not None and left_s > 0:
        waits_s, message = min(left_s, base.requeue_after_s or left_s), backoff.told(base.backoff)
        return replace(base, reason=PendingReason.BACKING_OFF, message=message, requeue_after_s=waits_s)
    missing = checks.source_missing(observed.job, endpoint, observed.source)
    if missing is not None:
        return replace(base, reason=missing[0], message=missing[1])
    feed = observed.record.feed
    if feed is None or feed.total_steps == 0:
        obstacle = observed.obstacle or checks.pod_obstacle(observed.feeder)
        if obstacle is None:
            return replace(base, message="the feeder reads the data set")
        message = f"the feeder cannot start: {obstacle.message}"
        stalled = not obstacle.passing
        return replace(base, reason=obstacle.reason, message=message, stalled=stalled, waits_for_feeder=True)
    return replace(base, reason=PendingReason.NO_CAPACITY, wants_agent=True)


def assign(
    observed: ObservedJob, decision: Decision, agents: Mapping[str, Heartbeat], agent: str | None, place: int
) -> Decision:
    """Return the decision after the placement: bound anew to `agent`, or, with None, `place`-th in the queue."""
    if not decision.wants_agent:
        return decision
    if agent is None or observed.endpoint is None:
        message = "it is in the queue, and no agent has room" + checks.asleep(observed.endpoint)
        return replace(decision, message=message, place=place)
    epoch, beat = decision.epoch + 1, agents[agent]
    binding = _binding(observed, observed.endpoint, epoch, Desired.RUN, decision.restarts)
    return replace(
        decision,
        state=JobState.RUNNING,
        reason="Starting",
        message=f"on agent {beat.pod_name}",
        wants_agent=False,
        epoch=epoch,
        agent=agent,
        pod=beat.pod_name,
        node=beat.node,
        actions=(Bind(observed.job.metadata.uid, agent, binding),),
    )


def _binding(
    observed: ObservedJob, endpoint: InferenceEndpoint, epoch: int, desired: Desired, restarts: int
) -> Binding:
    number, record, source = observed.adapter_number, observed.record, observed.source
    return binding_of(observed.job, endpoint, epoch, desired, number, restarts, record, source)


def _completed(observed: ObservedJob, base: Decision, endpoint: InferenceEndpoint, redis: RedisView) -> Decision:
    """Return the decision on a trained job: complete, once every ready agent serves the adapter."""
    result, spec = observed.record.result, observed.job.spec
    adapter = observed.job.status.adapter
    done = replace(
        base,
        state=JobState.COMPLETE,
        reason="Completed",
        backoff=None,
        actions=_dismissal(observed),
        feeder=FeederAction.SUSPEND,
    )
    if isinstance(result, Completed):
        done = replace(done, message=checks.ended_early(result, observed.record.feed))
    if adapter is None and isinstance(result, Completed) and result.adapter is not None:
        files = result.adapter
        uri = artifact_uri(endpoint.spec.artifact_store.uri, files.path)
        sha256, rank = files.sha256, result.rank
        adapter = PublishedAdapter(name=files.name, version=files.number, uri=uri, sha256=sha256, rank=rank)
    policy = spec.publish.policy
    if isinstance(result, Completed) and result.publish is not None:
        policy = result.publish  # it may have been changed since
    if adapter is None and policy is PublishPolicy.NEVER:
        return replace(done, published=(False, "NotRequested", "spec.publish.policy was Never when training ended"))
    if adapter is None and policy in checks.NOT_IMPROVED:
        message = f"spec.publish.policy is {policy}, and {checks.NOT_IMPROVED[policy]}"
        return replace(done, published=(False, "NotImproved", message))
    if adapter is None:
        message = "the agent finished without an adapter; this is a fault of the agent: see its log"
        return _end(observed, base, FailedReason.INTERNAL_ERROR, message)
    done = replace(done, adapter=adapter)
    stored = checks.only_stored(adapter, endpoint)
    if stored:
        return replace(done, published=(False, "Stored", stored))
    ready = [beat for beat in redis.agents.values() if beat.ready]
    missing = [beat for beat in ready if beat.adapters.get(adapter.name, 0) < adapter.version]
    if ready and not missing:
        message = f"{len(ready)} ready agents serve {adapter.name} version {adapter.version}"
        return replace(done, published=(True, "Published", message))
    served = f"{len(ready) - len(missing)} of {len(ready)} ready agents serve it"
    failures = [each for beat in missing if (each := failure(adapter.name, adapter.version, beat)) is not None]
    if failures:
        served += f"; {len(failures)} cannot load it: {failures[0].reason}"
    if missing and len([each for each in failures if each.tries >= LOAD_TRIES]) == len(missing):
        message = f"{served}; they go on trying, and the endpoint's condition AdaptersReady says when they have it"
        return replace(done, published=(False, "LoadFailed", message))
    if missing and not failures:
        served += f"; waiting for {', '.join(sorted(beat.pod_name for beat in missing)[:5])}"
    served += checks.asleep(endpoint)
    told = (False, "Publishing", served)
    return replace(done, state=JobState.RUNNING, reason="Publishing", message=served, published=told)


def _no_endpoint(observed: ObservedJob, base: Decision) -> Decision:
    name, namespace = observed.job.spec.endpoint_ref.name, observed.job.metadata.namespace
    state = "is being deleted" if observed.endpoint_goes else f"is not in namespace {namespace}"
    message = f"InferenceEndpoint {name} {state}: create it or name another"
    return replace(base, reason=PendingReason.ENDPOINT_NOT_FOUND, message=message, feeder=FeederAction.SUSPEND)


def _end(observed: ObservedJob, base: Decision, reason: FailedReason, message: str) -> Decision:
    return replace(
        base,
        state=JobState.FAILED,
        reason=reason,
        message=message,
        actions=_dismissal(observed),
        feeder=FeederAction.SUSPEND,
    )


def _over(observed: ObservedJob) -> Decision:
    """Return the decision on a job that ended before, and has yet to say so of its newest generation: nobody runs it,
    and Redis forgets it.
    """
    status, uid = observed.job.status, observed.job.metadata.uid
    feeding = observed.feeder is not None and observed.feeder.active
    known = observed.redis is not None and uid in observed.redis.known_jobs and not feeding
    return Decision(
        status.state or JobState.COMPLETE,
        status.reason or "",
        epoch=status.binding.epoch if status.binding else 0,
        restarts=status.restarts,
        adapter=status.adapter,
        actions=(*_dismissal(observed), Forget(uid)) if known else (),
        feeder=FeederAction.SUSPEND,
        settled=False,
    )


def _going(observed: ObservedJob) -> Decision:
    """Return the decision on a job that is being deleted, and that somebody's finalizer holds: nobody runs it."""
    status = observed.job.status
    return Decision(status.state or JobState.PENDING, status.reason or "", actions=_dismissal(observed), settled=False)


def _dismissal(observed: ObservedJob) -> tuple[RedisAction, ...]:
    fence = observed.record.fence
    return (Unbind(observed.job.metadata.uid, fence.agent, fence.epoch),) if fence is not None and fence.agent else ()


def _feeder_action(observed: ObservedJob, now: datetime) -> FeederAction:
    """Return what to do about the feeder. One whose work is lost, or that read something else, is made anew."""
    if observed.job.spec.suspend:
        return FeederAction.SUSPEND
    feeder = observed.feeder
    stale = feeder is not None and feeder.secret != observed.feeder_secret and not feeder.finished
    if feeder is not None and (feeder.checks or feeder.inputs != observed.feeder_inputs or stale):
        return FeederAction.RENEW
    if feeder is not None and feeder.finished and feeder.failure is None:
        feed = observed.record.feed
        if feed is None or observed.record.last_shard < feed.total_steps:
            return FeederAction.RENEW
    if feeder is not None and feeder.failure is not None:
        return FeederAction.RENEW if now.timestamp() - feeder.failed_at >= RENEW_AFTER_S else FeederAction.KEEP
    return FeederAction.RUN
