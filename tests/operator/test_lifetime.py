"""How long a job may go on, and how long it stays: what batch/v1 does with the fields of the same names."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from test_outages import World
from test_simulation import GROUP, finish

from coserve_api.conditions import condition, find_condition
from coserve_api.job import FinetuneJob
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord
from coserve_operator.decide import job_status
from coserve_operator.decide.actions import FeederAction, Unbind
from coserve_operator.decide.finished import Finished, finished

SHA = "0" * 64


def pause(it: Any, seconds: float) -> None:
    it.now += timedelta(seconds=seconds)


def test_a_job_that_is_not_done_by_its_deadline_fails_and_its_agent_is_free(it, make) -> None:
    it.bound()  # since 11:30, and now it is 12:00
    it.body["spec"]["activeDeadlineSeconds"] = 1801
    decision = it.judge()
    assert (decision.state, decision.requeue_after_s) == ("Running", 1.0)
    pause(it, 1)
    before, decision = it.see(), it.judge()
    assert (decision.state, decision.reason, decision.agent) == ("Failed", "DeadlineExceeded", "")
    assert "spec.activeDeadlineSeconds is 1801" in decision.message
    assert decision.actions == (Unbind("j-1", "uid-p1.b1", 1),)
    assert decision.feeder is FeederAction.SUSPEND
    status = it.write(decision)
    assert status.completion_time == "2026-11-21T12:00:01Z"
    assert find_condition(status.conditions, "Running").status == "False"
    assert "DeadlineExceeded" in [notice.reason for notice in job_status.events(before, decision, status)]


def test_the_deadline_is_free_and_none_runs_before_the_start(it) -> None:
    it.body["spec"]["activeDeadlineSeconds"] = 1
    pause(it, 9999)
    assert it.judge().state == "Pending"
    it.bound()
    assert it.judge().reason == "DeadlineExceeded"
    it.body["spec"]["activeDeadlineSeconds"] = 99_999
    assert it.judge().reason == "Training"


@pytest.mark.parametrize("where", ["no endpoint", "another artifact store", "back-off"])
def test_a_job_that_waits_after_its_start_has_no_more_time_either(it, where) -> None:
    faults = {
        "attempts": 9, "step": 0, "reason": "ArtifactStoreError", "message": "full", "until": "2026-11-21T12:05:00Z",
    }  # fmt: skip
    it.bound(backoff=faults, binding={"agent": "", "epoch": 1})
    it.record = JobRecord(fence=Fence(1, ""), feed=it.record.feed)
    it.body["spec"]["activeDeadlineSeconds"] = 2000
    if where == "no endpoint":
        it.endpoint = None
    elif where == "another artifact store":
        checkpoint = {"step": 2, "cursor": 2, "epoch": 1, "uri": "pvc://elsewhere/x", "sha256": "0" * 64}
        it.body["status"]["checkpoint"] = checkpoint
    assert (it.judge().state, it.judge().requeue_after_s) == ("Pending", 200.0)
    pause(it, 200)
    assert it.judge().reason == "DeadlineExceeded"


def test_suspended_time_does_not_count_and_resuming_begins_anew(it, make) -> None:
    it.bound()
    it.body["spec"] |= {"activeDeadlineSeconds": 2000, "suspend": True}
    pause(it, 9999)
    assert it.judge().reason == "Suspending"
    it.record, it.agents = JobRecord(fence=Fence(1, ""), feed=make.feed()), {}
    it.body["status"]["binding"]["agent"] = ""
    assert it.write(it.judge()).state == "Suspended"
    pause(it, 9999)
    assert it.judge().state == "Suspended"
    it.body["spec"]["suspend"] = False
    status = it.write(it.judge())
    assert (status.state, status.start_time) == ("Pending", "2026-11-21T11:30:00Z"), "what is frozen stays frozen"
    assert it.judge().requeue_after_s == 2000
    pause(it, 2000)
    assert it.judge().reason == "DeadlineExceeded"


def test_what_is_trained_in_time_is_complete_whenever_it_is_seen(it, make) -> None:
    it.bound()
    it.body["spec"]["activeDeadlineSeconds"] = 1
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=make.completed("adapter-1", 1))
    assert it.judge().reason == "Publishing"
    it.agents["uid-p1.b1"] = make.heartbeat("p1", adapters={"adapter-1": 1})
    assert it.judge().state == "Complete"
    it.redis_up = False
    assert not it.judge().settled, "it may be trained"


ADAPTER = {"name": "adapter-1", "version": 2, "uri": "pvc://artifacts/store/adapters/e-1/adapter-1/v2", "sha256": SHA}


def over(make: Any, ended: str = "2026-11-21T12:00:00Z", *, spec: Any = None, **status: Any) -> FinetuneJob:
    """A job that is over and has said so."""
    told = [condition(kind, True, "Completed", "", generation=1, now=make.NOW) for kind in ("Complete", "Finished")]
    conditions = [each.to_dict() for each in told]
    status = {"state": "Complete", "completionTime": ended, "observedGeneration": 1, "conditions": conditions} | status
    return make.job(status=status, **(spec or {}))


def due(job: FinetuneJob, endpoint: Any, now: Any) -> tuple[list[str], float | None]:
    """Which of it is deleted at `now`, and when to look again."""
    jobs, kept = Finished(), finished(job)
    assert kept is not None
    jobs.put(kept)
    return [each.uid for each in jobs.due(now, endpoint)], jobs.next_due_s(now)


def test_a_job_that_is_over_is_deleted_in_its_time(make: Any) -> None:
    endpoint, now, ttl = make.endpoint(), make.NOW, {"ttlSecondsAfterFinished": 60}
    assert due(over(make), endpoint, now) == ([], None)
    job = over(make, spec=ttl)
    assert due(job, endpoint, now) == ([], 60.0)
    assert due(job, endpoint, now + timedelta(seconds=60)) == (["j-1"], None)
    going = job.metadata.model_copy(update={"deletion_timestamp": "2026-11-21T12:01:00Z"})
    assert due(job.model_copy(update={"metadata": going}), endpoint, now + timedelta(seconds=60)) == ([], None)
    assert due(over(make, "2026-11-21T13:00:00Z", spec=ttl), endpoint, now + timedelta(seconds=60))[0] == [], "a clock"
    assert due(over(make, spec={"ttlSecondsAfterFinished": 0}), None, now)[0] == ["j-1"]


def test_a_job_is_kept_until_its_endpoint_keeps_its_adapter(make: Any) -> None:
    at_once = {"ttlSecondsAfterFinished": 0}
    job = over(make, spec=at_once, adapter=ADAPTER)
    assert due(job, make.endpoint(), make.NOW)[0] == []
    for version, gone in ((1, False), (2, True), (3, True)):
        adapter = ADAPTER | {"version": version, "readyAgents": 0, "rank": 8}
        assert bool(due(job, make.endpoint(status={"adapters": [adapter]}), make.NOW)[0]) is gone
    job = over(make, "2026-11-21T10:00:00Z", spec=at_once, adapter=ADAPTER | {"version": 9})
    assert due(job, make.endpoint(), make.NOW)[0] == ["j-1"], "it was published on an earlier endpoint of that name"


def test_a_job_that_has_yet_to_say_that_it_is_over_is_looked_at(make: Any) -> None:
    job = over(make)
    assert finished(job) is not None
    assert finished(make.job()) is None
    assert finished(over(make, conditions=job.status.to_dict()["conditions"][:1])) is None, "of an older version"
    assert finished(over(make, observedGeneration=0)) is None


def test_a_deleted_jobs_adapter_stays_and_nothing_of_the_job_is_made_anew(make: Any) -> None:
    world = World(make)
    body = world.kube.objects["FinetuneJob", "job-1"]
    world.kube.put(body | {"spec": body["spec"] | {"ttlSecondsAfterFinished": 30}})
    uid = body["metadata"]["uid"]
    world.end("job-1", True)
    world.go(20)
    assert world.kube.objects["FinetuneJob", "job-1"]["status"]["state"] == "Complete"
    world.names.remove("job-1")
    for _ in range(40):
        world.go(1)
    assert ("FinetuneJob", "job-1") not in world.kube.objects
    assert world.store.published["adapter-1"].number == 1
    adapters = world.kube.objects["InferenceEndpoint", "tiny"]["status"]["adapters"]
    assert [(each["name"], each["version"]) for each in adapters] == [("adapter-1", 1)]
    assert uid not in world.store.known
    world.store.clear()
    world.go(3)
    assert list(world.store.published) == ["adapter-1"], "also in a Redis that was emptied"


@pytest.mark.parametrize("ttl", [0, 30])
def test_the_pass_that_sees_a_changed_time_to_live_acts_on_it(make: Any, ttl: int) -> None:
    """The status that it writes is no reason for another pass."""
    world = World(make)
    for name in world.names:
        world.end(name, True)
    world.go(5)
    for name in world.names:
        body = world.kube.objects["FinetuneJob", name]
        changed = {"spec": body["spec"] | {"ttlSecondsAfterFinished": ttl}}
        world.kube.put(body | changed | {"metadata": body["metadata"] | {"generation": 2}})
        assert body["status"]["state"] == "Complete"
    left = finish(world.controller.reconcile(GROUP))
    gone = [("FinetuneJob", name) not in world.kube.objects for name in world.names]
    assert gone == [ttl == 0] * 2
    assert ttl == 0 or 20 < left <= 30
