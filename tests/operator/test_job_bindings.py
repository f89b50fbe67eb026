"""When a job changes its agent: faults, suspension, and agents that are to go."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from coserve_api.conditions import find_condition
from coserve_contract.messages import Desired, Released
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord
from coserve_operator.decide import job as jobs
from coserve_operator.decide import job_status
from coserve_operator.decide.actions import Bind, FeederAction, Unbind, UpdateBinding


def test_a_lost_agent_is_counted_and_the_job_goes_on_elsewhere(it, make) -> None:
    it.bound()
    it.agents = {"uid-p2.b1": make.heartbeat("p2")}
    decision = jobs.assign(it.see(), it.judge(), it.agents, "uid-p2.b1", 0)
    assert (decision.restarts, decision.epoch, decision.pod) == (1, 2, "p2")
    before = it.see()
    told = [notice.reason for notice in job_status.events(before, decision, it.write(decision))]
    assert told == ["AgentLost", "Bound"]


def test_a_restarted_container_is_a_lost_agent(it, make) -> None:
    it.bound()
    it.agents = {make.agent_of("p1", "b2"): make.heartbeat("p1", boot="b2")}
    assert it.judge().restarts == 1


def test_as_long_as_heartbeats_may_only_be_late_nothing_is_decided(it) -> None:
    it.bound()
    it.agents, it.settled = {}, False
    decision = it.judge()
    assert not decision.settled
    assert decision.actions == ()
    assert job_status.status_of(it.see(), decision, it.now) == it.see().job.status


def test_without_redis_everything_stays(it) -> None:
    it.bound()
    it.redis_up = False
    assert not it.judge().settled


def faults(failures: int, step: int = 0) -> dict[str, Any]:
    return {
        "attempts": failures + 1, "failures": failures, "step": step, "reason": "AgentLost", "message": "before",
        "until": "2026-11-21T11:59:00Z",
    }  # fmt: skip


def test_too_many_lost_agents_in_a_row_fail_the_job(it) -> None:
    it.bound(restarts=90, backoff=faults(6))
    it.agents = {}
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Failed", "BackoffLimitExceeded")
    assert "7 attempts failed since the checkpoint of step 0, and spec.backoffLimit is 6" in decision.message
    assert decision.actions == (Unbind("j-1", "uid-p1.b1", 1),)
    it.bound(restarts=90, backoff=faults(5))
    it.agents = {}
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Pending", "BackingOff")
    assert decision.requeue_after_s == 300
    it.body["spec"]["backoffLimit"] = 5
    assert it.judge().state == "Failed", "the limit counts as it is now"


def test_a_later_checkpoint_ends_a_row_of_faults(it, make) -> None:
    it.bound(backoff=faults(6))
    it.agents = {}
    it.record = replace(it.record, checkpoint=make.checkpoint(1))
    decision = it.judge()
    assert (decision.wants_agent, decision.restarts, decision.backoff.failures) == (True, 1, 1)


def test_a_pod_that_was_taken_away_is_no_failure_of_the_job(it) -> None:
    it.bound(backoff=faults(6))
    it.agents, it.disrupted = {}, True
    decision = it.judge()
    assert (decision.reason, decision.backoff.failures, decision.restarts) == ("BackingOff", 6, 1)


def test_a_fault_of_an_agent_is_told_and_the_job_tried_again_later(it, make) -> None:
    it.bound()
    given = Released(epoch=1, step=3, reason="ArtifactStoreError", message="No space left on device")
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=given, checkpoint=make.checkpoint(3))
    before, decision = it.see(), it.judge()
    assert (decision.wants_agent, decision.restarts) == (True, 0), "the first time at once, and elsewhere if need be"
    waiting = jobs.assign(before, decision, {}, None, 1)
    told = job_status.events(before, waiting, it.write(waiting))
    assert [notice.reason for notice in told] == ["ArtifactStoreError", "NoCapacity"]
    assert (
        "No space left on device (this does not count as a failure); the last checkpoint is of step 3"
        in told[0].message
    )
    again = it.judge()
    assert again.backoff == decision.backoff, "it is counted once"


def test_an_emptied_redis_is_told_again_what_the_status_says_under_the_same_epoch(it, make) -> None:
    it.bound(epoch=3)
    it.record = JobRecord()
    decision = it.judge()
    assert (decision.state, decision.restarts, decision.epoch) == ("Running", 0, 3)
    (action,) = decision.actions
    assert isinstance(action, Bind)
    assert (action.agent, action.binding.epoch) == ("uid-p1.b1", 3)
    it.agents = {"uid-p1.b1": make.heartbeat("p1")}
    it.record = JobRecord(feed=make.feed())
    decision = it.judge()
    assert (decision.wants_agent, decision.restarts) == (True, 0), "the agent lives but does not have the job"


def test_a_job_given_back_is_bound_again_without_being_counted(it, make) -> None:
    it.bound()
    it.record = JobRecord(
        fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=Released(epoch=1, step=3), checkpoint=make.checkpoint(3)
    )
    decision = it.judge()
    assert (decision.wants_agent, decision.restarts, decision.actions) == (True, 0, (Unbind("j-1", "uid-p1.b1", 1),))
    waiting = jobs.assign(it.see(), decision, {}, None, 1)
    before = it.see()
    told = [notice.reason for notice in job_status.events(before, waiting, it.write(waiting))]
    assert told == ["Released", "NoCapacity"]


def test_suspend_asks_for_the_job_back_then_waits_and_resume_goes_on(it, make) -> None:
    it.bound()
    it.body["spec"]["suspend"] = True
    decision = it.judge()
    (action,) = decision.actions
    assert isinstance(action, UpdateBinding)
    assert action.binding.desired is Desired.STOP
    assert (decision.reason, decision.feeder) == ("Suspending", FeederAction.SUSPEND)
    it.write(decision)
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=Released(epoch=1, step=3))
    status = it.write(it.judge())
    assert (status.state, find_condition(status.conditions, "Suspended").status) == ("Suspended", "True")
    it.body["spec"]["suspend"] = False
    it.record = JobRecord(fence=Fence(1, ""), feed=make.feed(), result=Released(epoch=1, step=3))
    decision = it.judge()
    assert decision.wants_agent
    assert find_condition(it.write(decision).conditions, "Suspended").status == "False"


def test_an_agent_that_never_gives_a_job_back_loses_the_right_to_it(it) -> None:
    it.bound()
    it.body["spec"]["suspend"] = True
    it.write(it.judge())
    it.now += timedelta(seconds=30)
    assert it.judge().state == "Running"
    it.now += timedelta(seconds=31)
    assert it.judge().actions == (Unbind("j-1", "uid-p1.b1", 1),)
    assert it.judge().state == "Suspended"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"priority": 2}, {"priority": 2}),
        ({"checkpoint": {"everySteps": 7, "keep": 5}}, {"checkpoint_every_steps": 7, "checkpoint_keep": 5}),
        ({"publish": {"policy": "Never"}}, {"publish": "Never"}),
    ],
)
def test_what_changes_of_a_running_jobs_spec_is_told_once(it, spec, told) -> None:
    it.bound()
    (action,) = it.judge().actions  # nothing is known to have been told yet
    it.bindings["j-1"] = action.binding
    assert it.judge().actions == ()
    it.body["spec"] |= spec
    (action,) = it.judge().actions
    assert isinstance(action, UpdateBinding)
    assert (action.binding.epoch, action.binding.desired) == (1, Desired.RUN)
    assert told.items() <= action.binding.spec.live.items()
    it.bindings["j-1"] = action.binding
    assert it.judge().actions == ()


def test_an_endpoints_slowdown_that_changes_is_told_once_and_may_be_taken_back(it, make) -> None:
    it.bound()
    (action,) = it.judge().actions
    assert action.binding.spec.max_slowdown_percent is None
    it.bindings["j-1"] = action.binding
    for percent in (20, 0, None):
        it.endpoint = make.endpoint(finetuning={"maxSlowdownPercent": percent})
        (action,) = it.judge().actions
        assert isinstance(action, UpdateBinding)
        assert (action.binding.epoch, action.binding.spec.max_slowdown_percent) == (1, percent)
        it.bindings["j-1"] = action.binding
        assert it.judge().actions == ()


def test_a_job_on_an_agent_that_is_to_go_is_asked_for(it) -> None:
    it.bound()
    it.leaving = frozenset({"uid-p1.b1"})
    decision = it.judge()
    assert decision.reason == "Moving"
    assert decision.actions[0].binding.desired is Desired.STOP
