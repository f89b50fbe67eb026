"""What a job's status tells of its evaluations, and how a job ends whose evaluations end it."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_api.conditions import find_condition
from coserve_contract.messages import Completed, Evaluated
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord

LOSSES = (3.0, 2.5, None, 2.25)
EVALUATIONS = tuple(Evaluated(step=5 * n, loss=loss) for n, loss in enumerate(LOSSES))
IN_STATUS = [
    {"step": 0, "loss": "3"}, {"step": 5, "loss": "2.5"}, {"step": 10}, {"step": 15, "loss": "2.25"},
]  # fmt: skip


def bound(it: Any, make: Any, **record: Any) -> None:
    it.bound()
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(40), **record)


def test_the_last_evaluations_and_the_best_are_told(it, make) -> None:
    report = make.progress(1, 16, 40, evaluations=EVALUATIONS, best=EVALUATIONS[-1])
    bound(it, make, progress=report)
    progress = it.write(it.judge()).to_dict()["progress"]
    assert progress["evaluations"] == IN_STATUS
    assert (progress["bestStep"], progress["bestEvalLoss"]) == (15, "2.25")
    assert (progress["step"], progress["totalSteps"], progress["percent"]) == (16, 40, 40)


def test_a_job_that_ends_early_is_complete_at_its_step(it, make) -> None:
    result = make.completed("adapter-1", 1, step=15).model_copy(
        update={"evaluations": EVALUATIONS, "best": EVALUATIONS[1]}
    )
    bound(it, make, result=result)
    it.agents["uid-p1.b1"] = make.heartbeat("p1", adapters={"adapter-1": 1})
    status = it.write(it.judge()).to_dict()
    assert status["state"] == "Complete"
    assert status["progress"]["evaluations"] == IN_STATUS
    told = [status["progress"][name] for name in ("step", "totalSteps", "percent", "bestStep")]
    assert told == [15, 15, 100, 5]
    complete = next(one for one in status["conditions"] if one["type"] == "Complete")
    assert complete["message"] == "spec.evaluation.patience ended it after step 15 of 40"


@pytest.mark.parametrize(
    ("policy", "words"), [("Best", "no evaluation loss was below"), ("IfEvalImproves", "not fall")]
)
def test_a_job_that_did_not_improve_is_complete_without_an_adapter(it, make, policy, words) -> None:
    it.body["spec"] |= {"publish": {"policy": policy}, "evaluation": {"everySteps": 5}}
    bound(it, make, result=Completed(epoch=1, step=40, evaluations=EVALUATIONS[:1], best=EVALUATIONS[0]))
    status = it.write(it.judge())
    found = find_condition(status.conditions, "Published")
    assert (status.state, found.status, found.reason) == ("Complete", "False", "NotImproved")
    assert words in found.message
    assert find_condition(status.conditions, "Complete").message == ""


def test_an_agent_is_told_of_patience_and_policy(it, make) -> None:
    it.body["spec"] |= {"publish": {"policy": "Best"}, "evaluation": {"everySteps": 5, "patience": 3}}
    it.bound()
    (action,) = it.judge().actions
    assert (action.binding.spec.publish, action.binding.spec.patience) == ("Best", 3)
