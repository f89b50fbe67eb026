"""When a job changes its agent: faults, suspension, and agents that are to go."""

from __future__ import annotations

from datetime import timedelta

from coserve_api.conditions import find_condition
from coserve_api.messages import Desired, Released
from coserve_api.scripts import Fence
from coserve_api.store import JobRecord
from coserve_operator.reconcile import job as jobs
from coserve_operator.reconcile import job_status
from coserve_operator.reconcile.job import Bind, FeederWish, Rebrief, Unbind


def test_a_lost_agent_is_counted_and_the_job_goes_on_elsewhere(it, make) -> None:
    it.bound()
    it.agents = {"uid-p2.b1": make.heartbeat("p2")}
    verdict = jobs.give(it.see(), it.judge(), it.agents, "uid-p2.b1", 0)
    assert (verdict.restarts, verdict.epoch, verdict.pod) == (1, 2, "p2")
    before = it.see()
    told = [notice.reason for notice in job_status.notices(before, verdict, it.write(verdict))]
    assert told == ["AgentLost", "Bound"]


def test_a_restarted_container_is_a_lost_agent(it, make) -> None:
    it.bound()
    it.agents = {make.agent_of("p1", "b2"): make.heartbeat("p1", boot="b2")}
    assert it.judge().restarts == 1


def test_as_long_as_heartbeats_may_only_be_late_nothing_is_decided(it) -> None:
    it.bound()
    it.agents, it.settled = {}, False
    verdict = it.judge()
    assert not verdict.settled
    assert verdict.actions == ()
    assert job_status.status_of(it.see(), verdict, it.now) == it.see().job.status


def test_without_redis_everything_stays(it) -> None:
    it.bound()
    it.redis_up = False
    assert not it.judge().settled


def test_too_many_lost_agents_fail_the_job(it) -> None:
    it.bound(restarts=6)
    it.agents = {}
    verdict = it.judge()
    assert (verdict.state, verdict.reason) == ("Failed", "BackoffLimitExceeded")
    assert verdict.actions == (Unbind("j-1", "uid-p1.b1", 1),)
    it.bound(restarts=5)
    it.agents = {}
    assert it.judge().wants_agent


def test_an_emptied_redis_is_told_again_what_the_status_says_under_the_same_epoch(it, make) -> None:
    it.bound(epoch=3)
    it.record = JobRecord()
    verdict = it.judge()
    assert (verdict.state, verdict.restarts, verdict.epoch) == ("Running", 0, 3)
    (action,) = verdict.actions
    assert isinstance(action, Bind)
    assert (action.agent, action.binding.epoch) == ("uid-p1.b1", 3)
    it.agents = {"uid-p1.b1": make.heartbeat("p1")}
    it.record = JobRecord(feed=make.feed())
    verdict = it.judge()
    assert (verdict.wants_agent, verdict.restarts) == (True, 0), "the agent lives but does not have the job"


def test_a_job_given_back_is_bound_again_without_being_counted(it, make) -> None:
    it.bound()
    it.record = JobRecord(
        fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=Released(epoch=1, step=3), checkpoint=make.checkpoint(3)
    )
    verdict = it.judge()
    assert (verdict.wants_agent, verdict.restarts, verdict.actions) == (True, 0, (Unbind("j-1", "uid-p1.b1", 1),))
    waiting = jobs.give(it.see(), verdict, {}, None, 1)
    before = it.see()
    told = [notice.reason for notice in job_status.notices(before, waiting, it.write(waiting))]
    assert told == ["Released", "NoCapacity"]


def test_suspend_asks_for_the_job_back_then_waits_and_resume_goes_on(it, make) -> None:
    it.bound()
    it.body["spec"]["suspend"] = True
    verdict = it.judge()
    (action,) = verdict.actions
    assert isinstance(action, Rebrief)
    assert action.binding.desired is Desired.STOP
    assert (verdict.reason, verdict.feeder) == ("Suspending", FeederWish.SUSPEND)
    it.write(verdict)
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=Released(epoch=1, step=3))
    status = it.write(it.judge())
    assert (status.state, find_condition(status.conditions, "Suspended").status) == ("Suspended", "True")
    it.body["spec"]["suspend"] = False
    it.record = JobRecord(fence=Fence(1, ""), feed=make.feed(), result=Released(epoch=1, step=3))
    verdict = it.judge()
    assert verdict.wants_agent
    assert find_condition(it.write(verdict).conditions, "Suspended").status == "False"


def test_an_agent_that_never_gives_a_job_back_loses_the_right_to_it(it) -> None:
    it.bound()
    it.body["spec"]["suspend"] = True
    it.write(it.judge())
    it.now += timedelta(seconds=30)
    assert it.judge().state == "Running"
    it.now += timedelta(seconds=31)
    assert it.judge().actions == (Unbind("j-1", "uid-p1.b1", 1),)
    assert it.judge().state == "Suspended"


def test_a_job_on_an_agent_that_is_to_go_is_asked_for(it) -> None:
    it.bound()
    it.leaving = frozenset({"uid-p1.b1"})
    verdict = it.judge()
    assert verdict.reason == "Moving"
    assert verdict.actions[0].binding.desired is Desired.STOP
