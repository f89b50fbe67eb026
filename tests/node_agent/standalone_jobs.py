"""Jobs and records as the tests of standalone mode want them."""

from __future__ import annotations

from typing import Any

from coserve_agent.standalone.job import Job
from coserve_agent.standalone.spec import parse_job
from coserve_contract.messages import Checkpoint, Completed, FeedStatus, Progress, Released
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord

AGENT = "pod.this-start"
SHA = "0" * 64
SPEC: dict[str, Any] = {
    "dataset": {"uri": "/data/rows.jsonl"},
    "adapter": {"name": "counts", "rank": 4},
    "training": {"maxSteps": 24},
}


def job(name: str = "job", spec: dict[str, Any] | None = None, **fields: Any) -> Job:
    request = parse_job({"spec": SPEC | (spec or {})})
    values = {"name": name, "uid": f"uid-{name}", "created_s": 0.0, "spec": request.spec, "number": 1}
    return Job(**values | fields)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, cursor=step, epoch=1, path=f"jobs/uid-job/e1/s{step}", sha256=SHA)


def record(agent: str | None = AGENT, step: int | None = None, **fields: Any) -> JobRecord:
    fence = None if agent is None else Fence(3, agent)
    return JobRecord(fence=fence, checkpoint=None if step is None else checkpoint(step), **fields)


def completed(step: int = 24, **fields: Any) -> Completed:
    adapter = {"name": "counts", "number": 1, "path": "adapters/local/counts/v1", "sha256": SHA}
    return Completed(**{"epoch": 3, "step": step, "adapter": adapter, "rank": 4} | fields)


def released(reason: str | None = None) -> Released:
    return Released(epoch=3, step=0, reason=reason, message="" if reason is None else "it broke")


def feed(**fields: Any) -> FeedStatus:
    return FeedStatus(**{"total_steps": 24, "samples": 60} | fields)


def progress(step: int, epoch: int = 3) -> Progress:
    return Progress(epoch=epoch, step=step, cursor=step, total_steps=24, loss=1.5, tokens_per_second=9.0)
