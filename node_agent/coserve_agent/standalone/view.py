"""A job as the API shows it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coserve_agent.standalone.job import Job, State
from coserve_api.common import timestamp
from coserve_api.job_status import PendingReason
from coserve_contract.messages import AdapterFiles, Completed, FeedStatus
from coserve_contract.store import JobRecord


@dataclass(frozen=True)
class Place:
    """Where a job stands among the others: `number` in the queue from 1, or None."""

    bound: bool = False
    fed: bool = False
    number: int | None = None


def state_of(job: Job, record: JobRecord, place: Place, now_s: float) -> tuple[State, str, str]:
    """Its state, a reason in a word, and a message."""
    if job.ended is not None:
        return job.ended.state, job.ended.reason, job.ended.message
    if isinstance(record.result, Completed):
        return State.RUNNING, "Publishing", "the adapter is being loaded"
    if place.bound:
        if job.suspended:
            return State.RUNNING, "Suspending", "it is being saved"
        fence, progress = record.fence, record.progress
        if fence is not None and progress is not None and progress.epoch == fence.epoch:
            return State.RUNNING, "Training", progress.rewound
        return State.PREPARING, "Starting", ""
    if job.suspended:
        return State.SUSPENDED, "Suspended", "resume it to go on"
    if job.faults is not None and job.faults.until_s > now_s:
        again = timestamp(datetime.fromtimestamp(job.faults.until_s, UTC))
        faults = job.faults
        tried = f"attempt {faults.attempts + 1} since step {faults.step} begins at {again}"
        return State.QUEUED, PendingReason.BACKING_OFF, f"{faults.reason}: {faults.message}; {tried}"
    if place.fed and (record.feed is None or record.feed.total_steps == 0):
        return State.PREPARING, PendingReason.WAITING_FOR_DATA, "its data set is being read"
    return State.QUEUED, PendingReason.NO_CAPACITY, f"place {place.number or 1} in the queue"


def view(job: Job, record: JobRecord, place: Place, artifacts: Path, now_s: float) -> dict[str, Any]:
    """All of it; `artifacts` is where adapters lie."""
    state, reason, message = state_of(job, record, place, now_s)
    result = record.result if isinstance(record.result, Completed) else None
    progress, feed = record.progress, record.feed
    told = result or progress
    running = state is State.RUNNING and progress is not None
    adapter = None if job.ended is None else job.ended.adapter
    best = None if told is None or told.best is None else {"step": told.best.step, "loss": told.best.loss}
    return {
        "object": "finetune_job",
        "name": job.name,
        "uid": job.uid,
        "state": state.value,
        "reason": str(reason),
        "message": message,
        "queue_position": None if job.ended or place.bound else place.number,
        "step": told.step if told else 0,
        "total_steps": feed.total_steps if feed else (progress.total_steps if progress else 0),
        "tokens": told.tokens if told else 0,
        "loss": told.loss if told else None,
        "learning_rate": progress.learning_rate if running and progress else None,
        "eval_loss_initial": told.eval_loss_initial if told else None,
        "eval_loss": told.eval_loss if told else None,
        "best": best,
        "tokens_per_second": progress.tokens_per_second if running and progress else None,
        "eta_seconds": progress.eta_seconds if running and progress else None,
        "checkpoint": None if record.checkpoint is None else {"step": record.checkpoint.step},
        "restarts": job.restarts,
        "adapter": None if adapter is None else _adapter(adapter, artifacts),
        "data": None if feed is None else _data(feed),
        "created": timestamp(job.created),
        "finished": None if job.ended is None else timestamp(datetime.fromtimestamp(job.ended.at_s, UTC)),
        "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _adapter(files: AdapterFiles, artifacts: Path) -> dict[str, Any]:
    return {"name": files.name, "version": files.number, "path": str(artifacts / files.path)}


def _data(feed: FeedStatus) -> dict[str, Any]:
    return {
        "samples": feed.samples,
        "eval_samples": feed.eval_samples,
        "skipped_lines": feed.skipped_lines,
        "notes": list(feed.notes),
    }
