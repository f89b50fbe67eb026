"""How long a job may go on, as for a batch/v1 Job."""

from datetime import datetime, timedelta

from coserve_api.conditions import find_condition
from coserve_api.job import FinetuneJob
from coserve_api.job_status import JobCondition


def deadline_left_s(job: FinetuneJob, now: datetime) -> float | None:
    """Return in how many seconds the job's deadline passes; None where none runs: it has not begun, or is suspended.

    A batch/v1 Job that is resumed gets another startTime. Here that is kept, since it freezes the spec, and the time of
    the condition Suspended is taken in its place.
    """
    limit, status = job.spec.active_deadline_seconds, job.status
    if limit is None or status.start_time is None or job.spec.suspend:
        return None
    since = datetime.fromisoformat(status.start_time)
    suspended = find_condition(status.conditions, JobCondition.SUSPENDED)
    if suspended is not None:
        if suspended.status == "True":
            return None  # it is being resumed by this pass
        since = max(since, datetime.fromisoformat(suspended.last_transition_time))
    return limit - (now - since) / timedelta(seconds=1)


def deadline_message(job: FinetuneJob) -> str:
    """Return what to tell of a job whose deadline has passed."""
    last = job.status.checkpoint
    kept = "there is no checkpoint" if last is None else f"the checkpoint of step {last.step} stays"
    return f"spec.activeDeadlineSeconds is {job.spec.active_deadline_seconds}, and the job was not done by then; {kept}"
