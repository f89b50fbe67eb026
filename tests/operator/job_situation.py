"""One job in one situation, as a pass of the operator would see it."""

from __future__ import annotations

from typing import Any

from coserve_api.conditions import condition
from coserve_api.job import FinetuneJob
from coserve_contract.messages import AdapterRecord
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord
from coserve_operator.decide import job as jobs
from coserve_operator.decide import job_status
from coserve_operator.decide.claims import claims
from coserve_operator.decide.decision import ObservedJob
from coserve_operator.decide.observed import RedisView
from coserve_operator.decide.sources import checkpoint_left, continued_from


class Situation:
    """One job on one endpoint; `see` gives what a pass would decide on."""

    def __init__(self, make: Any) -> None:
        self.make, self.endpoint, self.now = make, make.endpoint(), make.NOW
        self.body = make.job_body()
        self.record = JobRecord(feed=make.feed())
        self.agents: dict[str, Any] = {}
        self.owners: dict[str, str] = {}
        self.rivals: tuple[FinetuneJob, ...] = ()
        self.bindings: dict[str, Any] = {}
        self.published: dict[str, AdapterRecord] = {}
        self.settled, self.leaving, self.feeder, self.redis_up = True, frozenset[str](), None, True
        self.disrupted = False
        self.others: tuple[FinetuneJob, ...] = ()

    def see(self) -> ObservedJob:
        view = RedisView(
            "i", self.agents, {"j-1": self.record}, self.bindings, frozenset({"j-1"}), settled=self.settled
        )
        job, endpoint = FinetuneJob.from_dict(self.body), self.endpoint
        left = {each.metadata.name: checkpoint_left(each) for each in self.others}
        claimed = claims((job, *self.rivals), self.published.keys(), self.owners)
        return ObservedJob(
            job, endpoint, claimed, view if self.redis_up else None,
            self.feeder, "inputs", self.leaving,
            source=continued_from(job, endpoint, self.published, left.get) if endpoint is not None else None,
            disrupted=self.disrupted,
        )  # fmt: skip

    def bound(self, epoch: int = 1, pod: str = "p1", **status: Any) -> Situation:
        """The job, whose data are ready, runs on `pod` under `epoch`, in status and in Redis."""
        ready = condition("DataReady", True, "DataRead", "", generation=1, now=self.now)
        self.body["status"] = {
            "state": "Running", "reason": "Training", "startTime": "2026-11-21T11:30:00Z",
            "binding": {"agent": pod, "node": "node-1", "epoch": epoch}, "conditions": [ready.to_dict()],
        } | status  # fmt: skip
        self.record = JobRecord(fence=Fence(epoch, self.make.agent_of(pod)), feed=self.make.feed())
        self.agents[self.make.agent_of(pod)] = self.make.heartbeat(pod, jobs={"j-1": (epoch, 3)})
        return self

    def judge(self) -> jobs.Decision:
        return jobs.decide(self.see(), self.now)

    def write(self, decision: jobs.Decision) -> Any:
        """Write the decision's status into the job, as a pass does; return it."""
        status = job_status.status_of(self.see(), decision, self.now)
        self.body["status"] = status.to_dict()
        return status
