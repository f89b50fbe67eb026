"""A job that resumes from another job's checkpoint: which one is meant, and what an agent is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from test_job_sources import told

from coserve_contract.messages import Binding
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord
from coserve_operator.decide import job as jobs

SHA = "fedcba9876543210" * 4
URI = "pvc://artifacts/store/jobs/j-9/e3/s40"
CHECKPOINT = {"step": 40, "cursor": 40, "epoch": 3, "uri": URI, "sha256": SHA}


def binding(it: Any, make: Any) -> Binding:
    it.agents[make.agent_of("p1")] = make.heartbeat("p1")
    decision = jobs.assign(it.see(), it.judge(), it.agents, make.agent_of("p1"), 0)
    (action,) = decision.actions
    it.write(decision)
    found: Binding = action.binding
    return found


@pytest.mark.parametrize("by", ["name", "uri"])
def test_the_checkpoint_is_as_if_it_were_the_jobs_own(it, make, by) -> None:
    it.body["spec"]["resumeFrom"] = {"job": "before"} if by == "name" else {"uri": URI + "/", "sha256": SHA}
    failed = {"state": "Failed", "completionTime": "2026-11-21T11:50:00Z", "checkpoint": CHECKPOINT}
    it.others = (make.job("before", number=9, status=failed),) if by == "name" else ()
    first = binding(it, make)
    assert first.resume.model_dump() == {
        "version": 1, "step": 40, "cursor": 40, "epoch": 3, "path": "jobs/j-9/e3/s40", "sha256": SHA,
    }  # fmt: skip
    assert (first.spec.rank, first.spec.start.path, first.spec.start.rank) == (None, "jobs/j-9/e3/s40", None)
    assert it.body["status"]["continuedFrom"] == {"uri": URI, "sha256": SHA}
    it.others = ()
    it.record = JobRecord(feed=make.feed())
    it.body["status"]["binding"]["agent"] = ""
    assert binding(it, make).resume == first.resume, "what was chosen stays, though the other job is gone"
    it.record = JobRecord(feed=make.feed(), checkpoint=make.checkpoint(60))
    it.body["status"]["binding"]["agent"] = ""
    assert binding(it, make).resume.step == 60, "its own comes first"


def test_a_shape_that_is_set_is_told(it, make) -> None:
    it.body["spec"] |= {"resumeFrom": {"uri": URI, "sha256": SHA}, "adapter": {"name": "a", "rank": 4}}
    assert told(it, make).start.rank == 4


ENDED = {"completionTime": "2026-11-21T11:50:00Z"}


@pytest.mark.parametrize(
    "status",
    [None, ENDED, {"checkpoint": CHECKPOINT}, ENDED | {"checkpoint": CHECKPOINT | {"uri": "pvc://old/jobs/j/e3/s40"}}],
    ids=("gone", "none", "runs", "of an endpoint with another store"),
)
def test_a_job_that_has_no_last_checkpoint_yet_is_waited_for(it, make, status) -> None:
    """One that still runs removes old checkpoints as it goes."""
    it.body["spec"]["resumeFrom"] = {"job": "before"}
    it.others = () if status is None else (make.job("before", number=9, status=status),)
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Pending", "CheckpointNotFound")
    assert "spec.resumeFrom.job is before" in decision.message
    done = {"completionTime": "2026-11-21T11:50:00Z", "checkpoint": CHECKPOINT}
    it.others = (make.job("before", number=9, status=done),)
    assert it.judge().wants_agent


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://elsewhere/store/jobs/j-9/e3/s40",
        "pvc://artifacts/store/deeper/jobs/j-9/e3/s40",
        "file:///artifacts/jobs/j/e1/s1",
    ],
)
def test_a_checkpoint_elsewhere_is_waited_for_by_name(it, uri) -> None:
    it.body["spec"]["resumeFrom"] = {"uri": uri, "sha256": SHA}
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Pending", "EndpointRejected")
    assert f"spec.resumeFrom.uri is {uri}" in decision.message
    assert "pvc://artifacts/store/jobs" in decision.message


def test_a_fault_of_the_first_binding_is_measured_from_the_checkpoint(it, make) -> None:
    """It is no progress that the job begins at step 40."""
    it.body["spec"]["resumeFrom"] = {"uri": URI, "sha256": SHA}
    first = binding(it, make)
    it.record = JobRecord(fence=Fence(1, make.agent_of("p1")), feed=make.feed(), checkpoint=first.resume)
    it.agents = {}
    assert it.write(it.judge()).backoff.step == 40
    second = binding(it, make)
    it.record = JobRecord(fence=Fence(2, make.agent_of("p1")), feed=make.feed(), checkpoint=second.resume)
    it.agents = {}
    assert it.judge().backoff.attempts == 2
