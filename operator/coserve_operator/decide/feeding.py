"""Which waiting jobs hold a feeder: those that are next. The data of the others are checked, a few at a time, and then
nothing of them is held, neither a pod nor shards in Redis.
"""

from collections.abc import Mapping
from dataclasses import replace

from coserve_api.conditions import find_condition
from coserve_api.job_status import JobCondition, JobState, PendingReason
from coserve_operator.decide.actions import ClearStreams, FeederAction
from coserve_operator.decide.decision import Decision, ObservedJob
from coserve_operator.decide.observed import FeederView
from coserve_operator.decide.placement import created

MORE = 1
"""Jobs that are fed beyond those that can be bound at once, or beyond the head of the queue where none can."""
_FED = (FeederAction.RUN, FeederAction.KEEP, FeederAction.RENEW)
_IN_QUEUE = (PendingReason.NO_CAPACITY, PendingReason.WAITING_FOR_DATA)


def feed_the_next(
    observations: Mapping[str, ObservedJob], decisions: Mapping[str, Decision], free: int, checks: int
) -> dict[str, Decision]:
    """Return the decisions, with what becomes of the feeders of jobs that wait.

    Args:
        free: how many more jobs the agents take.
        checks: how many data sets of the endpoint may be checked at once.
    """
    waiting = sorted(
        (uid for uid, one in decisions.items() if _waits(one)), key=lambda uid: created(observations[uid].job)
    )
    queue = [uid for uid in waiting if decisions[uid].reason in _IN_QUEUE or decisions[uid].waits_for_feeder]
    turn = frozenset(queue[: max(free, 1) + MORE])
    unchecked = [uid for uid in waiting if uid not in turn and not is_checked(observations[uid])]
    begun = {uid for uid in unchecked if _is_read(observations[uid])}
    later = [uid for uid in unchecked if uid not in begun]
    checked_now = begun | {*later[: max(0, checks - len(begun))]}
    made = {uid: one if uid in turn else _without_shards(observations[uid], one) for uid, one in decisions.items()}
    for uid in waiting:
        if uid not in turn:
            made[uid] = _behind(observations[uid], made[uid], uid in checked_now)
        if not is_checked(observations[uid]):
            made[uid] = _say_reading(observations[uid], made[uid])
    return made


def is_checked(observed: ObservedJob) -> bool:
    """Return whether the job's data were read once, and can be used; Redis may have lost what was said of them."""
    feed = observed.record.feed
    if feed is not None:
        return feed.total_steps > 0
    ready = find_condition(observed.job.status.conditions, JobCondition.DATA_READY)
    return ready is not None and ready.status == "True"


def _waits(decision: Decision) -> bool:
    return decision.settled and not decision.agent and decision.state is JobState.PENDING and decision.feeder in _FED


def _is_read(observed: ObservedJob) -> bool:
    """Return whether a feeder reads the data now."""
    feeder = observed.feeder
    return feeder is not None and not feeder.suspended and not feeder.finished


def _without_shards(observed: ObservedJob, decision: Decision) -> Decision:
    """Return the decision on a job that is not fed: where nobody runs it either, Redis need not hold its shards."""
    idle = decision.settled and not decision.agent and decision.state in (JobState.PENDING, JobState.SUSPENDED)
    if not idle or not observed.record.streamed:
        return decision
    return replace(decision, actions=(*decision.actions, ClearStreams(observed.job.metadata.uid)))


def _behind(observed: ObservedJob, decision: Decision, check: bool) -> Decision:
    """Return the decision on a job whose turn has not come."""
    feeder = observed.feeder
    if not check:
        decision = replace(decision, feeder=FeederAction.KEEP if feeder is None else FeederAction.REMOVE)
    elif feeder is None or feeder.suspended:
        decision = replace(decision, feeder=FeederAction.CHECK)
    elif _is_as_made_now(feeder, observed) and not feeder.finished:
        decision = replace(decision, feeder=FeederAction.KEEP)
    if decision.reason is PendingReason.WAITING_FOR_DATA and is_checked(observed):
        message = "its data are read again when its turn comes"
        return replace(decision, reason=PendingReason.NO_CAPACITY, message=message)
    return decision


def _is_as_made_now(feeder: FeederView, observed: ObservedJob) -> bool:
    return (feeder.inputs, feeder.secret) == (observed.feeder_inputs, observed.feeder_secret)


def _say_reading(observed: ObservedJob, decision: Decision) -> Decision:
    """Return the decision with what becomes of data that were not read before, where the job waits for nothing else."""
    if decision.reason is not PendingReason.WAITING_FOR_DATA:
        return decision
    if not _is_read(observed) and decision.feeder is not FeederAction.RUN:
        return replace(decision, message="the data set waits for its check: some are checked at a time")
    if observed.feeder is not None and observed.feeder.trouble is None and observed.feeder.checks:
        return replace(decision, message="the data set is being checked")
    return decision
