"""A FinetuneJob's status from the verdict on it, and the events that tell of its changes."""

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
    Progress,
)
from coserve_api.messages import Completed, Evaluated
from coserve_api.uris import artifact_uri
from coserve_operator.reconcile.briefing import newer_checkpoint
from coserve_operator.reconcile.dataset_status import dataset_of, left_out, sentence
from coserve_operator.reconcile.job import FeederWish, Sight, Verdict
from coserve_operator.reconcile.observed import Notice

_LONGEST_ETA_MS = 9_999 * 3_600_000
_WAITING = (JobState.PENDING, JobState.SUSPENDED)


def status_of(sight: Sight, verdict: Verdict, now: datetime) -> JobStatus:
    """Return the status after `verdict`."""
    old = sight.job.status
    if not verdict.settled:
        return old
    binding = None
    if verdict.epoch > 0:
        binding = BindingStatus(agent=verdict.pod, node=verdict.node, epoch=verdict.epoch)
    return JobStatus(
        state=verdict.state,
        reason=verdict.reason,
        progress=_progress(sight, verdict),
        dataset=dataset_of(sight.record.feed, old.dataset),
        binding=binding,
        checkpoint=_checkpoint(sight, verdict),
        adapter=verdict.adapter,
        continued_from=old.continued_from or (sight.source if verdict.agent else None),
        endpoint_template_variables=_endpoint_variables(sight, verdict),
        restarts=verdict.restarts,
        observed_generation=sight.job.metadata.generation,
        start_time=old.start_time or (timestamp(now) if verdict.agent else None),
        completion_time=old.completion_time or (timestamp(now) if verdict.is_final else None),
        conditions=_conditions(sight, verdict, now),
    )


def _endpoint_variables(sight: Sight, verdict: Verdict) -> str | None:
    """Return the endpoint's variables of the chat template that the job keeps from when a feeder first reads its data,
    as JSON: as an object they would lose their nulls on the way through the API server.
    """
    kept = sight.job.status.endpoint_template_variables
    if kept is not None or sight.endpoint is None or verdict.feeder is not FeederWish.RUN:
        return kept
    variables = sight.endpoint.spec.engine.template_variables
    return None if variables_fault(variables) else json.dumps(variables, ensure_ascii=False, sort_keys=True)


def _checkpoint(sight: Sight, verdict: Verdict) -> CheckpointStatus | None:
    if sight.endpoint is None:
        return sight.job.status.checkpoint
    store = sight.endpoint.spec.artifact_store.uri
    newest = newer_checkpoint(sight.job, sight.endpoint, sight.record, verdict.epoch)
    if newest is None:
        return None
    uri = artifact_uri(store, newest.path)
    return CheckpointStatus(step=newest.step, cursor=newest.cursor, epoch=newest.epoch, uri=uri, sha256=newest.sha256)


def _progress(sight: Sight, verdict: Verdict) -> Progress | None:
    """Return how far the job is: the result where there is one, else the last report, else what was known."""
    record, old = sight.record, sight.job.status.progress
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
    runs = verdict.training and report.epoch == verdict.epoch
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


def _conditions(sight: Sight, verdict: Verdict, now: datetime) -> tuple[Condition, ...]:
    old, generation = sight.job.status.conditions, sight.job.metadata.generation
    bound = bool(verdict.agent)
    new: list[Condition] = []

    def add(kind: JobCondition, status: bool | None, reason: str, message: str = "") -> None:
        new.append(condition(kind, status, reason, message, generation=generation, now=now))

    data = _data(sight, verdict)
    if data is not None:
        add(JobCondition.DATA_READY, *data)
    add(JobCondition.BOUND, bound, "BoundToAgent" if bound else verdict.reason, verdict.message)
    add(JobCondition.RUNNING, verdict.training, verdict.reason, verdict.message)
    suspended = verdict.state is JobState.SUSPENDED
    if suspended or find_condition(old, JobCondition.SUSPENDED) is not None:
        add(JobCondition.SUSPENDED, suspended, "Suspended" if suspended else "Resumed", verdict.message)
    if verdict.published is not None:
        add(JobCondition.PUBLISHED, *verdict.published)
    if verdict.state is JobState.COMPLETE:
        add(JobCondition.COMPLETE, True, verdict.reason, verdict.message)
    if verdict.state is JobState.FAILED:
        add(JobCondition.FAILED, True, verdict.reason, verdict.message)
    return merge_conditions(old, new)


def _data(sight: Sight, verdict: Verdict) -> tuple[bool, str, str] | None:
    feed = sight.record.feed
    if feed is not None and feed.error is not None:
        return False, feed.error.reason, verdict.message
    if feed is not None and feed.total_steps > 0:
        return True, "DataRead", sentence(feed)
    if find_condition(sight.job.status.conditions, JobCondition.DATA_READY) is None:
        return False, "NotRead", ""
    return None  # Redis lost what the feeder said; it will say it again


def notices(sight: Sight, verdict: Verdict, new: JobStatus) -> list[Notice]:
    """Return the events of the change from the job's status to `new`; none when nothing worth telling changed."""
    old, told = sight.job.status, []
    before, after = old.binding, new.binding
    told += _data_notices(sight, new)
    if new.restarts > old.restarts:
        lost = before.agent if before else "?"
        step, limit = new.checkpoint.step if new.checkpoint else 0, sight.job.spec.backoff_limit
        message = f"agent {lost} was lost ({new.restarts} of {limit} restarts); the last checkpoint is of step {step}"
        told.append(Notice("AgentLost", message, warning=True))
    if after is not None and after.agent and (before is None or before.epoch < after.epoch):
        told.append(Notice("Bound", f"bound to agent {after.agent} on node {after.node}, epoch {after.epoch}"))
    elif before is not None and before.agent and new.state in _WAITING and new.restarts == old.restarts:
        told.append(Notice("Released", f"agent {before.agent} gave the job back"))
    if old.checkpoint is not None and new.checkpoint is not None and new.checkpoint.step < old.checkpoint.step:
        why = sight.record.progress.rewound if sight.record.progress else ""
        message = f"{why}; training goes on from the checkpoint of step {new.checkpoint.step}"
        told.append(Notice("CheckpointCorrupt", message, warning=True))
    if new.state != old.state or new.reason != old.reason:
        told += _change(verdict, new)
    if new.adapter is not None and verdict.published is not None and verdict.published[0]:
        told.append(Notice("Published", verdict.published[2]))
    return told


def _data_notices(sight: Sight, new: JobStatus) -> list[Notice]:
    """Return the event of data that has become ready; a warning where something is left out."""
    was, is_ = (find_condition(one.conditions, JobCondition.DATA_READY) for one in (sight.job.status, new))
    feed = sight.record.feed
    if feed is None or is_ is None or is_.status != "True" or (was is not None and was.status == "True"):
        return []
    return [Notice("DataReady", is_.message, warning=bool(left_out(feed)))]


def _change(verdict: Verdict, new: JobStatus) -> list[Notice]:
    if new.state is JobState.COMPLETE:
        loss = f", eval loss {new.progress.eval_loss}" if new.progress and new.progress.eval_loss else ""
        return [Notice("Complete", f"trained {new.progress.step if new.progress else 0} steps{loss}")]
    if new.state is JobState.FAILED:
        return [Notice(verdict.reason, verdict.message, warning=True)]
    if new.state in (JobState.PENDING, JobState.SUSPENDED):
        return [
            Notice(
                verdict.reason, verdict.message, warning=verdict.reason in ("EndpointNotFound", "FinetuningDisabled")
            )
        ]
    return []
