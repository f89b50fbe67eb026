"""When a job that met a fault is tried again, and when it has been tried often enough."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from coserve_api.common import timestamp
from coserve_api.job import FinetuneJob
from coserve_api.job_status import BackoffStatus
from coserve_contract.backoff import wait_s
from coserve_contract.messages import Checkpoint


@dataclass(frozen=True, slots=True)
class Fault:
    """What ended an attempt, in one word and in many, and whether it counts towards backoffLimit."""

    reason: str
    message: str
    counts: bool


def kept(job: FinetuneJob, accepted: Checkpoint | None) -> BackoffStatus | None:
    """Return the faults so far; none once a later checkpoint was accepted, or while the job is suspended."""
    backoff = job.status.backoff
    if backoff is None or job.spec.suspend or _step(job, accepted) > backoff.step:
        return None
    return backoff


def after(
    job: FinetuneJob, accepted: Checkpoint | None, before: BackoffStatus | None, fault: Fault, now: datetime
) -> BackoffStatus:
    """Return the faults with one more."""
    attempts = 1 if before is None else before.attempts + 1
    return BackoffStatus(
        attempts=attempts,
        failures=(0 if before is None else before.failures) + fault.counts,
        step=_step(job, accepted),
        reason=fault.reason,
        message=fault.message[:1024],
        until=timestamp(now + timedelta(seconds=wait_s(attempts))),
    )


def left_s(backoff: BackoffStatus | None, now: datetime) -> float:
    """Return in how many seconds the next attempt may begin."""
    return 0.0 if backoff is None else max(0.0, (datetime.fromisoformat(backoff.until) - now) / timedelta(seconds=1))


def told(backoff: BackoffStatus) -> str:
    """Return the last fault, and when the next attempt begins."""
    tried = f"attempt {backoff.attempts + 1} since step {backoff.step} begins at {backoff.until}"
    return f"{backoff.reason}: {backoff.message}; {tried}"


def exhausted(backoff: BackoffStatus, job: FinetuneJob) -> str | None:
    """Return why there is no further attempt, if there is none."""
    limit = job.spec.backoff_limit
    if backoff.failures <= limit:
        return None
    return (
        f"{backoff.failures} attempts failed since the checkpoint of step {backoff.step}, and spec.backoffLimit is "
        f"{limit}; the last: {backoff.message}"
    )


def _step(job: FinetuneJob, accepted: Checkpoint | None) -> int:
    known = 0 if job.status.checkpoint is None else job.status.checkpoint.step
    return known if accepted is None else max(known, accepted.step)
