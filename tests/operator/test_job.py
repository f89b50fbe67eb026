"""A job's decision and status, one situation at a time."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from coserve_api.conditions import find_condition
from coserve_api.job import PublishPolicy
from coserve_contract.messages import Desired, Failed, FeedError, FeedStatus
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord
from coserve_operator.decide import job as jobs
from coserve_operator.decide import job_status
from coserve_operator.decide.actions import Bind, FeederAction, Forget, Unbind
from coserve_operator.decide.observed import FeederView


def test_without_its_endpoint_a_job_waits_and_says_for_what(it) -> None:
    it.endpoint = None
    decision = it.judge()
    assert (decision.state, decision.reason, decision.feeder) == ("Pending", "EndpointNotFound", FeederAction.SUSPEND)
    assert "tiny" in decision.message


def variables(value):
    """A job with a template variable; no rule of the API server can see into it."""
    return {"dataset": {"uri": "pvc://d/x", "templateVariables": {"x": value}}}


def nested(depth):
    value = True
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"adapter": {"name": "a", "rank": 65}}, "RankTooLarge", "maxRank"),
        ({"adapter": {"name": "tiny"}}, "NameTaken", "base model"),
        ({"dataset": {"uri": "pvc://d/x", "maxSequenceLength": 4096}}, "EndpointRejected", "maxModelLength 1024"),
        (variables("x" * 16_400), "EndpointRejected", "bytes of JSON, and 16384 are allowed"),
        (variables(nested(40)), "EndpointRejected", "spec.dataset.templateVariables"),
        (variables(nested(600)), "EndpointRejected", "nested more than 32 deep"),
    ],
)
def test_a_spec_that_cannot_work_as_things_are_waits_with_a_remedy(it, spec, reason, words) -> None:
    it.body["spec"] |= spec
    decision = it.judge()
    assert (decision.state, decision.reason, decision.feeder) == ("Pending", reason, FeederAction.SUSPEND)
    assert words in decision.message
    status = job_status.status_of(it.see(), decision, it.now)
    assert status.completion_time is None
    assert job_status.events(it.see(), decision, status)[-1].warning
    it.body["spec"]["suspend"] = True
    assert it.judge().state == "Suspended"


STORE = {"artifactStore": {"uri": "pvc://all/artifacts"}, "finetuning": {"datasetClaims": ["all", "other"]}}
MOUNTED = {
    "artifactStore": {"uri": "file:///artifacts/store"},
    "finetuning": {"datasetClaims": ["all"]},
    "template": {
        "volumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "all"}}],
        "volumeMounts": [{"name": "a", "mountPath": "/artifacts"}],
    },
}


@pytest.mark.parametrize(
    ("endpoint", "spec", "words"),
    [
        ({"finetuning": {"datasetClaims": []}}, {}, "spec.dataset.uri is in claim data, .* lets jobs read none: .*"),
        ({"finetuning": {"datasetClaims": ["b", "c"]}}, {}, "read b, c: name another, or .*spec.finetuning.datasetC"),
        ({}, {"evaluation": {"uri": "pvc://secrets/x"}}, "spec.evaluation.uri is in claim secrets"),
        (STORE, {"dataset": {"uri": "pvc://all/data"}}, "which holds the checkpoints and adapters of endpoint tiny"),
        (MOUNTED, {"dataset": {"uri": "pvc://all/data"}}, "claim all, which holds the checkpoints"),
    ],
)
def test_a_job_reads_the_claims_that_the_endpoint_names_and_never_its_artifacts(
    it, make, endpoint, spec, words
) -> None:
    it.endpoint = make.endpoint(**endpoint)
    it.body["spec"] |= spec
    decision = it.judge()
    assert (decision.state, decision.reason, decision.feeder) == ("Pending", "DatasetNotAllowed", FeederAction.SUSPEND)
    assert re.search(words, decision.message), decision.message
    assert job_status.events(it.see(), decision, job_status.status_of(it.see(), decision, it.now))[-1].warning


def test_a_claim_that_is_allowed_by_now_is_read_and_a_started_job_goes_on(it, make) -> None:
    forbidding = make.endpoint(finetuning={"datasetClaims": []})
    it.endpoint = forbidding
    assert it.judge().reason == "DatasetNotAllowed"
    it.endpoint = make.endpoint(finetuning={"datasetClaims": ["data"]})
    assert it.judge().feeder is FeederAction.RUN
    it.bound()
    it.endpoint = forbidding
    assert it.judge().state == "Running"


def test_a_file_of_the_image_or_of_the_feeders_volumes_needs_no_claim(it, make) -> None:
    it.endpoint = make.endpoint(finetuning={"datasetClaims": []})
    it.body["spec"]["dataset"] = {"uri": "file:///data/x.jsonl"}
    assert it.judge().reason == "NoCapacity"


def test_a_job_whose_rank_is_allowed_by_now_goes_on(it, make) -> None:
    it.body["spec"]["adapter"]["rank"] = 128
    it.body["status"] = it.write(it.judge()).to_dict()
    assert it.judge().reason == "RankTooLarge"
    it.endpoint = make.endpoint(finetuning={"maxRank": 128})
    assert it.judge().reason != "RankTooLarge"
    assert it.judge().feeder is FeederAction.RUN


def test_the_endpoints_variables_count_with_the_jobs(it, make) -> None:
    it.body["spec"]["dataset"]["templateVariables"] = {f"a{n}": "x" * 300 for n in range(30)}
    assert it.judge().reason != "EndpointRejected"
    it.endpoint = make.endpoint(engine={"templateVariables": {f"b{n}": True for n in range(3)}})
    assert "has 33 variables, and 32 are allowed" in it.judge().message
    it.endpoint = make.endpoint(engine={"templateVariables": {"b": "x" * 8000}})
    assert "bytes of JSON" in it.judge().message
    it.endpoint = make.endpoint(engine={"templateVariables": {"a0": "x" * 300}})
    assert it.judge().reason != "EndpointRejected", "the job's own comes first"


def test_a_running_job_is_not_failed_by_a_later_change_of_the_endpoint(it, make) -> None:
    it.bound()
    it.endpoint = make.endpoint(finetuning={"maxRank": 4})
    assert it.judge().state == "Running"


def test_of_two_jobs_for_one_name_the_started_one_has_it_else_the_older(it, make) -> None:
    it.body["spec"]["adapter"]["name"] = "same"
    it.rivals = (make.job("other", number=2, adapter={"name": "same"}),)
    assert it.judge().reason != "NameTaken"
    it.rivals = (make.job("other", number=2, adapter={"name": "same"}, status={"startTime": "2026-11-21T11:40:00Z"}),)
    assert it.judge().reason == "NameTaken"
    assert "other" in it.judge().message
    it.rivals = ()
    assert it.judge().reason != "NameTaken"


def test_a_job_that_is_being_deleted_is_taken_from_its_agent_and_its_status_stays(it) -> None:
    it.bound()
    it.body["metadata"]["deletionTimestamp"] = "2026-11-21T12:00:00Z"
    decision = it.judge()
    assert [type(action) for action in decision.actions] == [Unbind]
    assert (decision.feeder, decision.wants_agent) == (FeederAction.KEEP, False)
    assert job_status.status_of(it.see(), decision, it.now) == it.see().job.status


def test_a_job_waits_for_its_data_then_for_an_agent(it, make) -> None:
    it.record = JobRecord()
    decision = it.judge()
    assert (decision.reason, decision.wants_agent, decision.feeder) == ("WaitingForData", False, FeederAction.RUN)
    it.record = JobRecord(feed=make.feed())
    decision = jobs.assign(it.see(), it.judge(), {}, None, 2)
    assert (decision.reason, decision.wants_agent) == ("NoCapacity", True)
    assert (decision.place, decision.message) == (2, "it is in the queue, and no agent has room")


def test_a_bad_line_fails_the_job_by_its_number(it) -> None:
    error = FeedError(reason="InvalidDataset", message="field messages is missing", line=17)
    it.record = JobRecord(feed=FeedStatus(error=error))
    decision = it.judge()
    assert (decision.state, decision.reason, decision.message) == (
        "Failed", "InvalidDataset", "line 17: field messages is missing",
    )  # fmt: skip
    status = it.write(decision)
    assert find_condition(status.conditions, "DataReady").status == "False"
    assert status.completion_time == "2026-11-21T12:00:00Z"


def test_a_feeder_that_gives_up_before_it_has_read_the_data_fails_the_job_with_its_last_message(it) -> None:
    it.record = JobRecord()
    it.feeder = FeederView("f", "inputs", finished=True, failure="pod x ended with OOMKilled (exit code 137)")
    assert it.judge().reason == "InternalError"
    assert "OOMKilled" in it.judge().message


def test_a_feeder_that_gives_up_later_is_made_anew_after_a_while(it) -> None:
    it.bound()
    failed_at = it.now.timestamp() - 59
    it.feeder = FeederView("f", "inputs", finished=True, failure="pod x ended with Error", failed_at=failed_at)
    decision = it.judge()
    assert (decision.state, decision.feeder) == ("Running", FeederAction.KEEP)
    assert decision.requeue_after_s == jobs.RENEW_AFTER_S
    it.now += timedelta(seconds=1)
    assert it.judge().feeder is FeederAction.RENEW


def test_binding_is_under_a_higher_epoch_than_any_seen_and_resumes_from_the_newer_checkpoint(it, make) -> None:
    it.body["status"] = {
        "binding": {"agent": "", "epoch": 4},
        "checkpoint": {"step": 20, "cursor": 20, "epoch": 4, "uri": "pvc://artifacts/store/jobs/j-1/e4/s20",
            "sha256": "0" * 64},
    }  # fmt: skip
    agents = {"uid-p1.b1": make.heartbeat("p1")}
    for accepted, resumed in ((None, 20), (make.checkpoint(10), 20), (make.checkpoint(30, 6), 30)):
        it.record = JobRecord(fence=Fence(6, ""), feed=make.feed(), checkpoint=accepted)
        decision = jobs.assign(it.see(), it.judge(), agents, "uid-p1.b1", 0)
        (action,) = decision.actions
        assert isinstance(action, Bind)
        assert (action.binding.epoch, action.binding.resume.step) == (7, resumed)
    status = it.write(decision)
    assert (status.binding.agent, status.binding.epoch, status.state) == ("p1", 7, "Running")
    assert status.start_time == "2026-11-21T12:00:00Z"
    assert find_condition(status.conditions, "Bound").status == "True"


def test_a_job_whose_checkpoint_is_not_below_the_artifact_store_waits_for_that_store(it) -> None:
    it.bound(checkpoint={"step": 2, "cursor": 2, "epoch": 1, "uri": "pvc://elsewhere/jobs/x", "sha256": "0" * 64})
    decision = it.judge()
    assert (decision.state, decision.reason, decision.feeder) == ("Pending", "EndpointRejected", FeederAction.SUSPEND)
    assert "create the endpoint with that artifact store again" in decision.message
    assert it.write(decision).checkpoint.uri == "pvc://elsewhere/jobs/x"


def test_a_bound_job_runs_once_its_agent_says_so(it, make) -> None:
    it.bound()
    assert (it.judge().reason, it.judge().training) == ("Training", True)
    it.agents[make.agent_of("p1")] = make.heartbeat("p1")
    assert (it.judge().reason, it.judge().training) == ("Starting", False)


def test_disabled_finetuning_takes_jobs_back_and_starts_none(it, make) -> None:
    it.endpoint = make.endpoint(finetuning={"policy": "Disabled"})
    assert (it.judge().state, it.judge().reason) == ("Pending", "FinetuningDisabled")
    it.bound()
    assert it.judge().actions[0].binding.desired is Desired.STOP


def test_an_adapter_is_published_when_every_ready_agent_has_it(it, make) -> None:
    it.bound()
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), result=make.completed("adapter-1", 1))
    it.agents["uid-p2.b1"] = make.heartbeat("p2", adapters={"adapter-1": 1})
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Running", "Publishing")
    assert "p1" in decision.message or "p1" in decision.published[2]
    assert decision.actions == (Unbind("j-1", "uid-p1.b1", 1),), "the agent is free for the next job"
    status = it.write(decision)
    assert status.adapter.uri == "pvc://artifacts/store/adapters/e-1/adapter-1/v1"
    it.record = JobRecord()  # Redis was emptied: the status remembers
    it.agents["uid-p1.b1"] = make.heartbeat("p1", adapters={"adapter-1": 1})
    decision = it.judge()
    assert (decision.state, decision.published[0]) == ("Complete", True)
    before = it.see()
    told = [notice.reason for notice in job_status.events(before, decision, it.write(decision))]
    assert told == ["Complete", "Published"]


def test_without_a_ready_agent_nothing_is_published(it, make) -> None:
    it.bound()
    it.record = JobRecord(result=make.completed("adapter-1", 1))
    it.agents = {}
    assert it.judge().reason == "Publishing"


def test_publish_never_completes_at_once(it, make) -> None:
    it.bound()
    it.body["spec"]["publish"] = {"policy": "Never"}
    it.record = JobRecord(result=make.completed("adapter-1", 1).model_copy(update={"adapter": None}))
    decision = it.judge()
    assert (decision.state, decision.published[1]) == ("Complete", "NotRequested")
    status = it.write(decision)
    assert (status.progress.percent, status.progress.step) == (100, 10)


@pytest.mark.parametrize(("by_then", "now"), [("Never", "Always"), ("IfEvalImproves", "Always"), ("Never", "Best")])
def test_a_policy_changed_after_the_end_does_not_count(it, make, by_then, now) -> None:
    it.bound()
    it.body["spec"] |= {"publish": {"policy": now}, "evaluation": {"everySteps": 1}}
    result = make.completed("adapter-1", 1).model_copy(update={"adapter": None, "publish": PublishPolicy(by_then)})
    it.record = JobRecord(result=result)
    decision = it.judge()
    expected = "NotRequested" if by_then == "Never" else "NotImproved"
    assert (decision.state, decision.published[1]) == ("Complete", expected)


def test_an_adapter_that_was_published_is_served_whatever_the_policy_became(it, make) -> None:
    it.bound()
    it.body["spec"]["publish"] = {"policy": "Never"}
    it.record = JobRecord(result=make.completed("adapter-1", 1).model_copy(update={"publish": PublishPolicy.ALWAYS}))
    it.agents["uid-p1.b1"] = make.heartbeat("p1", adapters={"adapter-1": 1})
    assert it.judge().published[:2] == (True, "Published")


def test_a_diverged_training_fails_with_the_agents_words(it) -> None:
    it.bound()
    it.record = JobRecord(
        fence=Fence(1, "uid-p1.b1"), result=Failed(epoch=1, reason="TrainingDiverged", message="loss is nan")
    )
    assert (it.judge().reason, it.judge().message) == ("TrainingDiverged", "loss is nan")


def test_what_is_over_stays_and_is_forgotten_when_its_feeder_is_gone(it) -> None:
    it.bound()
    it.body["status"] = {
        "state": "Failed", "reason": "TrainingDiverged",
        "conditions": [{"type": "Failed", "status": "True", "reason": "TrainingDiverged",
            "lastTransitionTime": "2026-11-21T11:50:00Z"}],
    }  # fmt: skip
    it.feeder = FeederView("f", "inputs", active=True)
    assert Forget("j-1") not in it.judge().actions
    it.feeder = FeederView("f", "inputs", suspended=True)
    assert Forget("j-1") in it.judge().actions
    assert it.write(it.judge()).reason == "TrainingDiverged"
    assert job_status.status_of(it.see(), it.judge(), it.now) == it.see().job.status


def test_a_feeder_is_made_anew_when_its_work_is_lost_or_its_inputs_changed(it, make) -> None:
    it.feeder = FeederView("f", "inputs", finished=True)
    it.record = JobRecord(feed=make.feed(10), last_shard=10)
    assert it.judge().feeder is FeederAction.RUN
    it.record = JobRecord(feed=make.feed(10), last_shard=9)
    assert it.judge().feeder is FeederAction.RENEW
    it.record = JobRecord()
    assert it.judge().feeder is FeederAction.RENEW
    it.feeder = FeederView("f", "others")
    it.record = JobRecord(feed=make.feed())
    assert it.judge().feeder is FeederAction.RENEW


def test_progress_is_told_in_the_units_of_the_status(it, make) -> None:
    it.bound()
    report = make.progress(1, 5, tokens=1000, loss=1.23456789, tokens_per_second=99.6, eta_seconds=132.4)
    it.record = JobRecord(fence=Fence(1, "uid-p1.b1"), feed=make.feed(), progress=report)
    progress = it.write(it.judge()).progress
    assert progress.to_dict() == {
        "step": 5, "totalSteps": 10, "percent": 50, "tokens": 1000, "loss": "1.23457", "tokensPerSecond": 100,
        "eta": "2m12s",
    }  # fmt: skip


def test_a_corrupt_checkpoint_is_told_once_and_leaves_the_status(it, make) -> None:
    store = "pvc://artifacts/store/jobs/j-1/e1"
    it.bound(epoch=2, checkpoint={"step": 40, "cursor": 40, "epoch": 1, "uri": f"{store}/s40", "sha256": "0" * 64})
    why = "the checkpoint of step 40 cannot be used: optimizer.safetensors: its checksum differs"
    it.record = JobRecord(
        fence=Fence(2, "uid-p1.b1"),
        feed=make.feed(),
        checkpoint=make.checkpoint(20, 1),
        progress=make.progress(2, 21, rewound=why),
    )
    before, decision = it.see(), it.judge()
    status = it.write(decision)
    assert (status.checkpoint.step, status.checkpoint.uri) == (20, f"{store}/s20")
    (notice,) = [one for one in job_status.events(before, decision, status) if one.reason == "CheckpointCorrupt"]
    assert notice.warning
    assert why in notice.message
    assert "step 20" in notice.message
    again = it.judge()
    assert job_status.events(it.see(), again, it.write(again)) == []
    it.bound(epoch=3, checkpoint={"step": 40, "cursor": 40, "epoch": 1, "uri": f"{store}/s40", "sha256": "0" * 64})
    it.record = JobRecord(
        fence=Fence(3, "uid-p1.b1"), feed=make.feed(), checkpoint=make.checkpoint(20, 1),
        progress=make.progress(2, 21, rewound=why),
    )  # fmt: skip
    assert it.write(it.judge()).checkpoint.step == 40, "what another binding said does not count"


def test_an_adapter_that_did_not_improve_is_not_published(it, make) -> None:
    it.bound()
    it.body["spec"]["publish"] = {"policy": "IfEvalImproves"}
    it.record = JobRecord(result=make.completed("adapter-1", 1).model_copy(update={"adapter": None}))
    decision = it.judge()
    assert (decision.state, decision.published[0], decision.published[1]) == ("Complete", False, "NotImproved")
    it.record = JobRecord(result=make.completed("adapter-1", 1))
    assert it.judge().reason == "Publishing"


def test_an_agent_is_told_all_of_a_jobs_settings(it, make) -> None:
    it.body["spec"] |= {
        "adapter": {"name": "adapter-1", "dropout": "0.05", "useRslora": "Enabled"},
        "training": {"epochs": 1, "adamBeta1": "0.8", "adamBeta2": "0.95", "adamEpsilon": "1e-6"},
        "evaluation": {"everySteps": 7},
        "priority": 3,
    }
    agents = {"uid-p1.b1": make.heartbeat("p1")}
    (action,) = jobs.assign(it.see(), it.judge(), agents, "uid-p1.b1", 0).actions
    told = action.binding.spec
    assert (told.dropout, told.use_rslora) == (0.05, True)
    assert (told.adam_beta1, told.adam_beta2, told.adam_epsilon) == (0.8, 0.95, 1e-6)
    assert (told.eval_every_steps, told.priority, told.weight) == (7, 3, 8.0)
