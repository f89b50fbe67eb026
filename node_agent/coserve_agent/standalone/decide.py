"""What is to be done with a job: a pure function of what is kept of it, what its run has said, and the time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel

from coserve_agent.standalone.job import Ended, Faults, Job, State
from coserve_api.job_status import FailedReason
from coserve_contract.backoff import COUNTED, wait_s
from coserve_contract.messages import AdapterRecord, Completed, Failed, Released
from coserve_contract.store import JobRecord

M = TypeVar("M", bound=BaseModel)
LOST = "ServerLost"


@dataclass(frozen=True)
class Seen:
    """What there is to see of a job. `runs`: this server's worker has it; `feeder_failed`: why it cannot be fed;
    `served`: the adapter that it published answers requests, or did not load.
    """

    record: JobRecord
    runs: bool = False
    feeder_failed: str | None = None
    served: bool = False


@dataclass(frozen=True)
class Decision:
    """The job as it should be kept, and what is to be done, in this order. `wants`: it is to run, and is not bound."""

    job: Job
    publish: AdapterRecord | None = None
    unbind: bool = False
    stop: bool = False
    bound: bool = False
    wants: bool = False
    forget: bool = False


def decide(job: Job, seen: Seen, agent: str, now_s: float) -> Decision:
    """What becomes of `job`; `agent` is this start of the server."""
    record = seen.record
    fence = record.fence
    named = fence is not None and fence.agent != ""
    if job.ended is not None:
        ttl_s = job.spec.ttl_seconds_after_finished
        over = job.deleted or (ttl_s is not None and now_s >= job.ended.at_s + ttl_s)
        return Decision(job, unbind=named, forget=over and not seen.runs)
    if isinstance(record.result, Completed):
        return _completed(job, record.result, seen, now_s)
    if isinstance(record.result, Failed):
        return _end(job, named, now_s, State.FAILED, record.result.reason, record.result.message)
    if job.cancelled or job.deleted:
        return _end(job, named, now_s, State.CANCELLED, "Cancelled", "it was cancelled")
    if record.feed is not None and record.feed.error is not None:
        error = record.feed.error
        line = "" if error.line is None else f"line {error.line}: "
        return _end(job, named, now_s, State.FAILED, error.reason, line + error.message)
    if seen.feeder_failed is not None:
        return _end(job, named, now_s, State.FAILED, FailedReason.INTERNAL_ERROR, seen.feeder_failed)
    deadline_s = job.spec.active_deadline_seconds
    if deadline_s is not None and job.begun_s is not None and not job.suspended and now_s >= job.begun_s + deadline_s:
        message = f"activeDeadlineSeconds is {deadline_s}, and it is not done; raise it, or train fewer steps"
        return _end(job, named, now_s, State.FAILED, FailedReason.DEADLINE_EXCEEDED, message)
    job = _without_old_faults(job, record)
    if not named:
        return Decision(job, wants=not job.suspended)
    assert fence is not None
    released = record.result if isinstance(record.result, Released) else None
    if released is not None and released.reason is not None:
        fault = (released.reason, released.message, released.reason in COUNTED)
        return _again(job, record, fault, now_s)
    if released is not None:
        return Decision(job, unbind=True)
    if fence.agent != agent:
        message = "the server that ran it ended without giving it back; its log says why"
        return _again(_changed(job, restarts=job.restarts + 1), record, (LOST, message, True), now_s)
    return Decision(job, bound=True, stop=job.suspended)


def _completed(job: Job, result: Completed, seen: Seen, now_s: float) -> Decision:
    """Complete once its adapter answers, so that whoever waited for that may call it."""
    files, early = result.adapter, ""
    total = seen.record.feed.total_steps if seen.record.feed else result.step
    if result.step < total:
        early = f"ended after {result.step} of {total} steps: patience is over"
    if files is None:
        early = early or "nothing was published: publish.policy asks for none, or the evaluation did not improve"
        return _end(job, True, now_s, State.COMPLETED, "Completed", early)
    record = AdapterRecord(**files.model_dump(), job_uid=job.uid, rank=result.rank or 1)
    if not seen.served:
        return Decision(job, publish=record)
    done = _end(job, True, now_s, State.COMPLETED, "Completed", early)
    assert done.job.ended is not None
    return replace(done, publish=record, job=_changed(done.job, ended=_changed(done.job.ended, adapter=files)))


def _again(job: Job, record: JobRecord, fault: tuple[str, str, bool], now_s: float) -> Decision:
    """It met a fault, and is tried again, unless that was done often enough."""
    reason, message, counts = fault
    before = job.faults
    attempts = 1 + (before.attempts if before else 0)
    failures = int(counts) + (before.failures if before else 0)
    step = record.checkpoint.step if record.checkpoint else 0
    limit = job.spec.backoff_limit
    if failures > limit:
        told = (
            f"{failures} attempts failed since the checkpoint of step {step}, and backoffLimit is {limit}; the last: "
        )
        return _end(job, True, now_s, State.FAILED, FailedReason.BACKOFF_LIMIT_EXCEEDED, told + message)
    faults = Faults(
        attempts=attempts,
        failures=failures,
        step=step,
        reason=reason,
        message=message[:1024],
        until_s=now_s + wait_s(attempts),
    )
    return Decision(_changed(job, faults=faults), unbind=True)


def _end(job: Job, named: bool, now_s: float, state: State, reason: str, message: str) -> Decision:
    ended = Ended(state=state, reason=reason, message=message[:2048], at_s=now_s)
    return Decision(_changed(job, ended=ended), unbind=named)


def _without_old_faults(job: Job, record: JobRecord) -> Job:
    """Those before a later checkpoint, or before it was suspended, count no more."""
    step = record.checkpoint.step if record.checkpoint else 0
    if job.faults is not None and (job.suspended or step > job.faults.step):
        return _changed(job, faults=None)
    return job


def _changed(part: M, **changes: Any) -> M:
    return part.model_copy(update=changes)
