"""A FinetuneJob's status from the decision on it, and the events that tell of its changes."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from coserve_api.common import format_decimal, format_duration, timestamp, variables_fault
from coserve_api.conditions import Condition, condition, find_condition, merge_conditions
from coserve_api.job_status import (
    BindingStatus,
    CheckpointStatus,
    EvaluationStatus,
    JobCondition,
    JobState,
    JobStatus,
    PendingReason,
    Progress,
)
from coserve_api.uris import artifact_uri
from coserve_contract.messages import Completed, Evaluated
from coserve_operator.decide.actions import FeederAction
from coserve_operator.decide.binding import newer_checkpoint
from coserve_operator.decide.checks import checkpoint_elsewhere
from coserve_operator.decide.dataset_status import dataset_of, left_out, sentence
from coserve_operator.decide.decision import Decision, ObservedJob, is_final
from coserve_operator.decide.observed import Event

_LONGEST_ETA_MS = 9_999 * 3_600_000
_READING = (FeederAction.RUN, FeederAction.CHECK)
_WAITING = (JobState.PENDING, JobState.SUSPENDED)
_TO_CHANGE = frozenset(PendingReason) - {
    PendingReason.NO_CAPACITY, PendingReason.WAITING_FOR_DATA, PendingReason.BACKING_OFF,
}  # fmt: skip
"""What a job waits for until somebody changes something."""


def status_of(observed: ObservedJob, decision: Decision, now: datetime) -> JobStatus:
    """Return the status after `decision`."""
    old = observed.job.status
    if not decision.settled:
        return _ended_before(observed, now)
    binding = None
    if decision.epoch > 0:
        binding = BindingStatus(agent=decision.pod, node=decision.node, epoch=decision.epoch)
    return JobStatus(
        **old.unknown,
        state=decision.state,
        reason=decision.reason,
        progress=_progress(observed, decision),
        dataset=dataset_of(observed.record.feed, old.dataset),
        queue_position=decision.place or None,
        binding=binding,
        checkpoint=_checkpoint(observed, decision),
        adapter=decision.adapter,
        continued_from=old.continued_from or (observed.source if decision.agent else None),
        endpoint_template_variables=_endpoint_variables(observed, decision),
        restarts=decision.restarts,
        backoff=decision.backoff,
        observed_generation=observed.job.metadata.generation,
        start_time=old.start_time or (timestamp(now) if decision.agent else None),
        completion_time=old.completion_time or (timestamp(now) if decision.is_final else None),
        conditions=_conditions(observed, decision, now),
    )


def _ended_before(observed: ObservedJob, now: datetime) -> JobStatus:
    """Return the status as it is. What is over is so whatever becomes of the spec, and Finished, also where an older
    version ended it: else who waits for a condition of the newest generation waits for ever.
    """
    old, generation = observed.job.status, observed.job.metadata.generation
    if not is_final(observed.job):
        return old
    conditions = old.conditions
    if find_condition(conditions, JobCondition.FINISHED) is None:
        end = condition(JobCondition.FINISHED, True, old.reason or "Finished", "", generation=generation, now=now)
        conditions = merge_conditions(conditions, [end])
    seen = {"observed_generation": generation}
    return old.model_copy(update={**seen, "conditions": tuple(each.model_copy(update=seen) for each in conditions)})


def _endpoint_variables(observed: ObservedJob, decision: Decision) -> str | None:
    """Return the endpoint's variables of the chat template that the job keeps from when a feeder first reads its data,
    as JSON: as an object they would lose their nulls on the way through the API server.
    """
    kept = observed.job.status.endpoint_template_variables
    if kept is not None or observed.endpoint is None or decision.feeder not in _READING:
        return kept
    variables = observed.endpoint.spec.engine.template_variables
    return None if variables_fault(variables) else json.dumps(variables, ensure_ascii=False, sort_keys=True)


def _checkpoint(observed: ObservedJob, decision: Decision) -> CheckpointStatus | None:
    if observed.endpoint is None or checkpoint_elsewhere(observed.job, observed.endpoint) is not None:
        return observed.job.status.checkpoint
    store = observed.endpoint.spec.artifact_store.uri
    newest = newer_checkpoint(observed.job, observed.endpoint, observed.record, decision.epoch)
    if newest is None:
        return None
    uri = artifact_uri(store, newest.path)
    return CheckpointStatus(step=newest.step, cursor=newest.cursor, epoch=newest.epoch, uri=uri, sha256=newest.sha256)


def _progress(observed: ObservedJob, decision: Decision) -> Progress | None:
    """Return how far the job is: the result where there is one, else the last report, else what was known."""
    record, old = observed.record, observed.job.status.progress
    total = record.feed.total_steps if record.feed else old.total_steps if old else 0
    result = record.result
    if isinstance(result, Completed):
        return Progress(
            step=result.step,
            total_steps=result.step,  # patience may have ended it before the last of the data
            percent=100,
            tokens=result.tokens,
            loss=_decimal(result.loss) or (old.loss if old else None),
            eval_loss_initial=_decimal(result.eval_loss_initial) or (old.eval_loss_initial if old else None),
            eval_loss=_decimal(result.eval_loss) or (old.eval_loss if old else None),
            **_evaluations(result.best, result.evaluations),
        )
    report = record.progress
    if report is None:
        return old or (Progress(total_steps=total) if total else None)
    total = report.total_steps or total
    runs = decision.training and report.epoch == decision.epoch
    return Progress(
        step=report.step,
        total_steps=total,
        percent=min(100, 100 * report.step // total) if total else 0,
        tokens=report.tokens,
        loss=_decimal(report.loss),
        eval_loss_initial=_decimal(report.eval_loss_initial),
        eval_loss=_decimal(report.eval_loss),
        **_evaluations(report.best, report.evaluations),
        tokens_per_second=round(report.tokens_per_second) if runs and report.tokens_per_second is not None else None,
        eta=_eta(report.eta_seconds) if runs else None,
    )


def _evaluations(best: Evaluated | None, last: Sequence[Evaluated]) -> dict[str, Any]:
    """Return the fields of a Progress that tell of the evaluations."""
    return {
        "best_step": None if best is None else best.step,
        "best_eval_loss": None if best is None else _decimal(best.loss),
        "evaluations": tuple(EvaluationStatus(step=one.step, loss=_decimal(one.loss)) for one in last) or None,
    }


def _decimal(value: float | None) -> str | None:
    return None if value is None else format_decimal(value)


def _eta(seconds: float | None) -> str | None:
    return None if seconds is None else format_duration(min(round(seconds) * 1000, _LONGEST_ETA_MS))


def _conditions(observed: ObservedJob, decision: Decision, now: datetime) -> tuple[Condition, ...]:
    old, generation = observed.job.status.conditions, observed.job.metadata.generation
    bound = bool(decision.agent)
    new: list[Condition] = []

    def add(kind: JobCondition, status: bool | None, reason: str, message: str = "") -> None:
        new.append(condition(kind, status, reason, message, generation=generation, now=now))

    add(JobCondition.ACCEPTED, True, "Accepted")
    data = _data(observed, decision)
    if data is not None:
        add(JobCondition.DATA_READY, *data)
    add(JobCondition.BOUND, bound, "BoundToAgent" if bound else decision.reason, decision.message)
    add(JobCondition.RUNNING, decision.training, decision.reason, decision.message)
    suspended = decision.state is JobState.SUSPENDED
    if suspended or find_condition(old, JobCondition.SUSPENDED) is not None:
        add(JobCondition.SUSPENDED, suspended, "Suspended" if suspended else "Resumed", decision.message)
    if decision.published is not None:
        add(JobCondition.PUBLISHED, *decision.published)
    if decision.state is JobState.COMPLETE:
        add(JobCondition.COMPLETE, True, decision.reason, decision.message)
    if decision.state is JobState.FAILED:
        add(JobCondition.FAILED, True, decision.reason, decision.message)
    add(JobCondition.FINISHED, decision.is_final, decision.reason)
    stalled = decision.stalled or decision.state is JobState.FAILED
    add(
        JobCondition.STALLED, stalled, decision.reason if stalled else "NotStalled", decision.message if stalled else ""
    )
    moving = decision.state in (JobState.PENDING, JobState.RUNNING) and not stalled
    add(JobCondition.RECONCILING, moving, decision.reason)
    return merge_conditions(old, new)


def _data(observed: ObservedJob, decision: Decision) -> tuple[bool, str, str] | None:
    feed = observed.record.feed
    if feed is not None and feed.error is not None:
        return False, feed.error.reason, decision.message
    if feed is not None and feed.total_steps > 0:
        return True, "DataRead", sentence(feed)
    known = find_condition(observed.job.status.conditions, JobCondition.DATA_READY)
    if known is None or known.status != "True":
        reading = decision.reason == PendingReason.WAITING_FOR_DATA or decision.waits_for_feeder
        return False, "NotRead", decision.message if reading else ""
    return None  # Redis lost what the feeder said; it will say it again


def events(observed: ObservedJob, decision: Decision, new: JobStatus) -> list[Event]:
    """Return the events of the change from the job's status to `new`; none when nothing worth telling changed."""
    old, told = observed.job.status, []
    before, after = old.binding, new.binding
    told += _data_events(observed, new)
    faults, known = new.backoff, old.backoff
    if faults is not None and (known is None or faults.attempts != known.attempts or faults.step != known.step):
        step, limit = new.checkpoint.step if new.checkpoint else 0, observed.job.spec.backoff_limit
        count = f"{faults.failures} of {limit} failures" if faults.failures else "this does not count as a failure"
        message = f"{faults.message} ({count}); the last checkpoint is of step {step}"
        told.append(Event(faults.reason, message, warning=True))
    if after is not None and after.agent and (before is None or before.epoch < after.epoch):
        told.append(Event("Bound", f"bound to agent {after.agent} on node {after.node}, epoch {after.epoch}"))
    elif before is not None and before.agent and new.state in _WAITING and faults == known:
        told.append(Event("Released", f"agent {before.agent} gave the job back"))
    if old.checkpoint is not None and new.checkpoint is not None and new.checkpoint.step < old.checkpoint.step:
        why = observed.record.progress.rewound if observed.record.progress else ""
        message = f"{why}; training goes on from the checkpoint of step {new.checkpoint.step}"
        told.append(Event("CheckpointCorrupt", message, warning=True))
    if new.state != old.state or new.reason != old.reason:
        told += _change(decision, new)
    if new.adapter is not None and decision.published is not None and decision.is_final:
        published, reason, message = decision.published
        told.append(Event(reason, message, warning=not published))
    return told


def _data_events(observed: ObservedJob, new: JobStatus) -> list[Event]:
    """Return the event of data that has become ready; a warning where something is left out."""
    was, is_ = (find_condition(one.conditions, JobCondition.DATA_READY) for one in (observed.job.status, new))
    feed = observed.record.feed
    if feed is None or is_ is None or is_.status != "True" or (was is not None and was.status == "True"):
        return []
    return [Event("DataReady", is_.message, warning=bool(left_out(feed)))]


def _change(decision: Decision, new: JobStatus) -> list[Event]:
    if new.state is JobState.COMPLETE:
        loss = f", eval loss {new.progress.eval_loss}" if new.progress and new.progress.eval_loss else ""
        return [Event("Complete", f"trained {new.progress.step if new.progress else 0} steps{loss}")]
    if new.state is JobState.FAILED:
        return [Event(decision.reason, decision.message, warning=True)]
    if new.state in (JobState.PENDING, JobState.SUSPENDED):
        warning = decision.reason in _TO_CHANGE or decision.stalled
        return [Event(decision.reason, decision.message, warning=warning)]
    return []
