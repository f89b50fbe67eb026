"""What becomes of a job, for each thing that there is to see of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from standalone_jobs import AGENT, checkpoint, completed, feed, job, record, released

from coserve_agent.standalone.decide import LOST, Decision, Seen, decide
from coserve_agent.standalone.job import Ended, Faults, Job, State
from coserve_contract.messages import Failed, FeedError

NOW_S = 1000.0


def decided(it: Job, found: Any, **seen: Any) -> Decision:
    return decide(it, Seen(found, **seen), AGENT, NOW_S)


def faults(failures: int, step: int = 0) -> Faults:
    return Faults(attempts=failures, failures=failures, step=step, reason="x", message="y", until_s=0.0)


def test_a_new_job_wants_a_place_and_one_that_runs_keeps_it() -> None:
    assert decided(job(), record(None)) == Decision(job(), wants=True)
    assert decided(job(), record()) == Decision(job(), bound=True)
    assert decided(job(), record("")) == Decision(job(), wants=True)


def test_a_suspended_job_is_stopped_and_then_waits_for_nothing() -> None:
    it = job(suspended=True)
    assert decided(it, record()) == Decision(it, bound=True, stop=True)
    assert decided(it, record(result=released())) == Decision(it, unbind=True)
    assert decided(it, record("", result=released())) == Decision(it)


def test_a_job_is_complete_once_its_adapter_answers() -> None:
    found = record(result=completed(), feed=feed())
    before = decided(job(), found)
    assert before.publish is not None
    assert (before.publish.name, before.publish.number, before.publish.rank, before.job) == ("counts", 1, 4, job())
    after = decided(job(), found, served=True)
    assert after.job.ended is not None
    assert (after.job.ended.state, after.job.ended.adapter) == (State.COMPLETED, completed().adapter)
    assert (after.job.ended.at_s, after.unbind) == (NOW_S, True)


def test_a_job_that_publishes_nothing_is_complete_and_says_so() -> None:
    ended = decided(job(), record(result=completed(adapter=None), feed=feed())).job.ended
    assert ended is not None
    assert (ended.state, ended.adapter) == (State.COMPLETED, None)
    assert "nothing was published" in ended.message
    early = decided(job(), record(result=completed(7), feed=feed()), served=True).job.ended
    assert early is not None
    assert early.message == "ended after 7 of 24 steps: patience is over"


def test_what_cannot_be_trained_fails_with_its_reason() -> None:
    wrong = Failed(epoch=3, reason="TrainingDiverged", message="lower it")
    unread = FeedError(reason="InvalidDataset", message="no", line=7)
    for found, seen, reason, words in (
        (record(result=wrong), {}, "TrainingDiverged", "lower it"),
        (record(feed=feed(error=unread)), {}, "InvalidDataset", "line 7: no"),
        (record(None), {"feeder_failed": "its feeder ended"}, "InternalError", "its feeder ended"),
    ):
        ended = decided(job(), found, **seen).job.ended
        assert ended is not None
        assert (ended.state, ended.reason) == (State.FAILED, reason)
        assert words in ended.message


@pytest.mark.parametrize("field", ["cancelled", "deleted"])
def test_a_cancelled_job_is_unbound_at_once(field: str) -> None:
    decision = decided(job(**{field: True}), record(), runs=True)
    assert decision.job.ended is not None
    assert (decision.job.ended.state, decision.unbind, decision.forget) == (State.CANCELLED, True, False)


def test_a_job_that_was_done_before_it_was_cancelled_is_done() -> None:
    ended = decided(job(cancelled=True), record(result=completed(), feed=feed()), served=True).job.ended
    assert ended is not None
    assert ended.state is State.COMPLETED


def test_a_job_is_forgotten_when_nothing_of_it_runs() -> None:
    over = job(deleted=True, ended=Ended(state=State.CANCELLED, at_s=0.0))
    assert not decided(over, record(), runs=True).forget
    assert decided(over, record("")).forget
    kept = over.model_copy(update={"deleted": False})
    assert not decided(kept, record("")).forget


def test_a_job_is_deleted_when_its_time_is_over() -> None:
    it = job(spec={"ttlSecondsAfterFinished": 60}, ended=Ended(state=State.COMPLETED, at_s=NOW_S - 59))
    assert not decided(it, record("")).forget
    assert decide(it, Seen(record("")), AGENT, NOW_S + 1).forget


def test_a_deadline_counts_from_its_beginning_and_not_while_it_is_suspended() -> None:
    it = job(spec={"activeDeadlineSeconds": 60}, begun_s=NOW_S - 60)
    ended = decided(it, record()).job.ended
    assert ended is not None
    assert ended.reason == "DeadlineExceeded"
    assert decided(it.model_copy(update={"suspended": True}), record()).job.ended is None
    assert decided(it.model_copy(update={"begun_s": NOW_S - 59}), record()).job.ended is None


def test_a_job_that_was_given_back_goes_on_at_once_and_that_is_no_fault() -> None:
    decision = decided(job(), record(result=released()))
    assert (decision.unbind, decision.job) == (True, job())


def test_a_job_of_a_server_that_was_killed_goes_on_and_that_is_a_fault() -> None:
    decision = decided(job(), record("pod.another-start"))
    assert (decision.unbind, decision.bound, decision.job.restarts) == (True, False, 1)
    assert decision.job.faults is not None
    assert (decision.job.faults.reason, decision.job.faults.failures) == (LOST, 1)
    assert decision.job.faults.until_s == NOW_S, "the first attempt begins at once"


def test_faults_in_a_row_wait_longer_and_longer_until_the_limit() -> None:
    it, waits = job(), []
    for _ in range(7):
        decision = decided(it, record(result=released("InternalError")))
        it = decision.job
        waits.append(None if it.faults is None or it.ended else it.faults.until_s - NOW_S)
    assert waits == [0, 10, 20, 40, 80, 160, None]
    assert it.ended is not None
    assert it.ended.reason == "BackoffLimitExceeded"
    assert (
        "7 attempts failed since the checkpoint of step 0, and backoffLimit is 6; the last: it broke"
        in it.ended.message
    )


def test_a_store_that_is_away_waits_and_counts_for_nothing() -> None:
    faulty = decided(job(faults=faults(6)), record(result=released("ArtifactStoreError"))).job
    assert faulty.ended is None
    assert faulty.faults is not None
    assert (faulty.faults.failures, faulty.faults.attempts) == (6, 7)


def test_a_later_checkpoint_forgives_the_faults_before() -> None:
    assert decided(job(faults=faults(6)), record(step=5)).job.faults is None
    assert decided(job(faults=faults(6, step=5)), record(step=5)).job.faults is not None
    again = decided(job(faults=faults(6)), replace(record("x"), checkpoint=checkpoint(5))).job
    assert again.faults is not None
    assert (again.faults.failures, again.faults.step) == (1, 5)
