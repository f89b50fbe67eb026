"""What an endpoint's conditions say of what is observed, and what kubectl, Flux and Argo CD make of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from operator_fakes import FakeKube, FakeStore

from coserve_api.conditions import Condition, find_condition
from coserve_api.job_status import JobState
from coserve_contract.store import JobRecord
from coserve_operator.apply.budget import StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.controller import Controller, ReconcileError
from coserve_operator.decide import job_status
from coserve_operator.decide.decision import Decision
from coserve_operator.decide.endpoint_status import ObservedEndpoint, events, status_of
from coserve_operator.decide.job import assign, decide
from coserve_operator.decide.observed import FeederView, Obstacle, PodView, RedisView, Unreadable
from coserve_operator.decide.obstacles import foreign, refusal, refused
from coserve_operator.manifests.metadata import is_leaving
from coserve_operator.redis.store import StoreError
from coserve_operator.settings import Settings
from coserve_operator.watch.cache import Cache
from coserve_operator.watch.views import feeder_view, pod_trouble, pod_view, replica_failure

NEW, OLD = "digest-new", "digest-old"
QUOTA = 'pods "tiny-6d75-lrvg6" is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2'
NO_IMAGE = ("ImagePullBackOff", "pod p: no such image")


def kstatus(body: dict[str, Any]) -> str:
    """As cli-utils computes it for a kind that it does not know (pkg/kstatus/status/generic.go)."""
    conditions = body["status"].get("conditions", [])
    if body["metadata"].get("deletionTimestamp"):
        return "Terminating"
    if body["status"].get("observedGeneration", body["metadata"]["generation"]) != body["metadata"]["generation"]:
        return "InProgress"
    for each in conditions:
        if each["status"] == "True" and each["type"] in ("Reconciling", "Stalled"):
            return "InProgress" if each["type"] == "Reconciling" else "Failed"
    ready = [each["status"] for each in conditions if each["type"] == "Ready"]
    return "Current" if not ready or ready == ["True"] else "InProgress"


def pod(name: str, template: str = NEW, *, ready: bool = True, **more: Any) -> PodView:
    return PodView(name, f"uid-{name}", ready=ready, template=template, **more)


def seen(make: Any, *pods: PodView, replicas: int = 2, **more: Any) -> ObservedEndpoint:
    return ObservedEndpoint(
        make.endpoint(replicas=replicas), pods=pods, redis=RedisView("i", {}, settled=True), template=NEW, **more
    )


def told(conditions: tuple[Condition, ...]) -> dict[str, tuple[str, str]]:
    return {each.type: (each.status.value, each.reason) for each in conditions}


STATES = {
    "all": (("new", "new"), {}, ("True", "AllAgentsReady"), "Current"),
    "starting": (("new?", "new?"), {}, ("False", "AgentsStarting"), "InProgress"),
    "some": (("new", "new?"), {}, ("True", "SomeAgentsReady"), "InProgress"),
    "scaled up": (("new",), {}, ("True", "SomeAgentsReady"), "InProgress"),
    "scaled down": (("new", "new", "new"), {}, ("True", "AllAgentsReady"), "InProgress"),
    "rolling": (("old", "new?"), {}, ("False", "RollingOut"), "InProgress"),
    "rolled half": (("old", "new"), {}, ("True", "SomeAgentsReady"), "InProgress"),
    "no image": (("old", "new!"), {}, ("False", "ImagePullBackOff"), "Failed"),
    "asleep": ((), {"replicas": 0}, ("False", "ScaledToZero"), "InProgress"),
    "quota at a scale-up": (("new",), {"obstacle": refused(QUOTA)}, ("True", "QuotaExceeded"), "Failed"),
    "foreign": (
        (), {"obstacle": foreign("Service", "tiny", "the endpoint's", leaving=False)}, ("False", "NameTaken"), "Failed",
    ),
    "an earlier endpoint's": (
        (), {"obstacle": foreign("Service", "tiny", "ours", leaving=True)}, ("False", "WaitingForDeletion"),
        "InProgress",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_ready_is_of_the_newest_template_and_kstatus_agrees(make, state: str) -> None:
    words, more, ready, health = STATES[state]
    made = []
    for number, word in enumerate(words):
        template = OLD if word.startswith("old") else NEW
        trouble = NO_IMAGE if word.endswith("!") else None
        made.append(pod(f"p{number}", template, ready=word[-1] not in "?!", trouble=trouble))
    status = status_of(seen(make, *made, **more), make.NOW)
    conditions = told(status.conditions)
    assert conditions["Ready"] == ready
    assert conditions["Accepted"] == ("True", "Accepted")
    assert conditions["Available"][0] == str(any(each.ready for each in made))
    assert {conditions["Reconciling"][0], conditions["Stalled"][0]} != {"True"}
    assert kstatus({"metadata": {"generation": 1}, "status": status.to_dict()}) == health


def test_waiting_for_more_nodes_is_no_standstill(make) -> None:
    nowhere = ("Unschedulable", "pod p: 0/2 nodes have a GPU")
    status = status_of(seen(make, pod("p", ready=False, trouble=nowhere)), make.NOW)
    assert told(status.conditions)["Ready"] == ("False", "Unschedulable")
    assert kstatus({"metadata": {"generation": 1}, "status": status.to_dict()}) == "InProgress"


def test_without_redis_nothing_is_said_of_traffic(make) -> None:
    gone = Unreadable("Unreachable", "Redis: connection refused")
    status = status_of(replace(seen(make, pod("p"), pod("q")), redis=None, unreadable=gone), make.NOW)
    conditions = told(status.conditions)
    assert conditions["SLOMet"] == ("Unknown", "NotKnown")
    assert conditions["RedisReady"] == ("False", "Unreachable")
    assert conditions["Ready"] == ("True", "AllAgentsReady")


def test_an_obstacle_is_an_event_that_warns(make) -> None:
    before = status_of(seen(make, pod("p"), pod("q")), make.NOW)
    after = status_of(seen(make, pod("p"), obstacle=refused(QUOTA)), make.NOW)
    (event,) = events(before, after)
    assert (event.reason, event.warning) == ("QuotaExceeded", True)
    assert "exceeded quota: q" in event.message
    assert [each.warning for each in events(after, before)] == [False]


def test_what_the_api_server_says_has_a_reason() -> None:
    said = {
        QUOTA: "QuotaExceeded",
        'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true': "PodSecurityViolated",
        'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 4Gi': "LimitRangeExceeded",
        'admission webhook "x" denied the request: no': "Rejected",
        'duplicate entries for key [name="HOME"]': "Rejected",
    }
    assert {message: refusal(message, "Rejected") for message in said} == said


def test_a_deployments_failure_is_read() -> None:
    failed = {
        "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": QUOTA,
        "lastTransitionTime": "2026-11-21T12:00:00Z", "lastUpdateTime": "2026-11-21T12:00:00Z",
    }  # fmt: skip
    said = QUOTA.replace("lrvg6", "*")  # each try has another name
    assert replica_failure({"status": {"conditions": [failed]}}) == Obstacle("QuotaExceeded", said)
    assert replica_failure({"status": {"conditions": [failed | {"status": "False"}]}}) is None
    assert replica_failure({"status": {}}) is None
    assert replica_failure(None) is None


def test_a_container_that_comes_before_ours_may_be_what_cannot_start() -> None:
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "no sidecar"}}
    status = {"initContainerStatuses": [{"name": "sidecar", "state": waits, "ready": False}]}
    assert pod_trouble({"metadata": {"name": "p"}, "status": status}) == ("ImagePullBackOff", "pod p: no sidecar")


def test_a_feeder_without_a_pod_is_asked_why() -> None:
    meta = {"uid": "f"}
    assert feeder_view({"metadata": meta, "status": {}}, ()).podless
    assert not feeder_view({"metadata": meta, "status": {"active": 1}}, ()).podless
    assert not feeder_view({"metadata": meta, "spec": {"suspend": True}, "status": {}}, ()).podless
    over = {"conditions": [{"type": "Complete", "status": "True"}]}
    assert not feeder_view({"metadata": meta, "status": over}, ()).podless


def test_what_an_earlier_object_owned_goes_by_itself() -> None:
    def owned(**meta: Any) -> dict[str, Any]:
        return {"metadata": {"name": "x", **meta}}

    assert is_leaving(owned(ownerReferences=[{"kind": "InferenceEndpoint", "uid": "other", "controller": True}]))
    assert is_leaving(owned(deletionTimestamp="2026-11-21T12:00:00Z"))
    assert not is_leaving(owned())
    assert not is_leaving(owned(ownerReferences=[{"kind": "ReplicaSet", "uid": "other", "controller": True}]))


def test_a_pod_whose_containers_are_being_made_says_since_when(make) -> None:
    creating = {"name": "agent", "ready": False, "state": {"waiting": {"reason": "ContainerCreating"}}}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-21T12:00:00Z"}
    status = {"containerStatuses": [creating], "conditions": [scheduled]}
    body = {"metadata": {"name": "p", "uid": "u"}, "status": status}
    assert pod_view(body).creating_since == make.NOW.timestamp()
    view = feeder_view({"metadata": {"uid": "f"}, "status": {"active": 1}}, [body])
    assert view.creating == pod_view(body)
    status["containerStatuses"] = [creating | {"state": {"running": {}}}]
    assert pod_view(body).creating_since is None


def test_the_first_status_comes_before_anything_is_asked_of_redis(make) -> None:
    cache = Cache()
    kube, store, seen = FakeKube(cache), FakeStore(make), {}

    async def away(_: str) -> None:
        seen.update({kind: body for (kind, _), body in kube.objects.items()})
        raise StoreError("Redis: away")

    store.assert_user = away
    kube.put(make.endpoint_body())
    kube.put(make.job_body())
    clock = lambda: 0.0  # noqa: E731
    parts = Applier(kube, clock), StatusBudget(clock), Recorder(kube, "test")
    slot = MetricsSlotKeeper(kube, ("ns", "metrics"), clock, lambda: None)
    controller = Controller(Settings(), kube, store, cache, *parts, slot, lambda: make.NOW)
    with contextlib.suppress(ReconcileError):
        controller.reconcile(("ml", "tiny")).send(None)
    for kind in ("InferenceEndpoint", "FinetuneJob"):
        first = {each["type"]: each["status"] for each in seen[kind]["status"]["conditions"]}
        assert first["Accepted"] == first["Reconciling"] == "True"
        assert kstatus(seen[kind]) == "InProgress"
    assert (seen["FinetuneJob"]["status"]["state"], seen["FinetuneJob"]["status"]["reason"]) == ("Pending", "Accepted")
    assert kube.objects["FinetuneJob", "job-1"]["status"]["reason"] == "RedisUnavailable"


# ---- jobs ----


def test_a_job_is_finished_when_it_is_complete_and_when_it_failed(make, it) -> None:
    it.bound()
    status = it.write(it.judge())
    assert told(status.conditions)["Finished"] == ("False", "Training")
    assert kstatus({"metadata": {"generation": 1}, "status": status.to_dict()}) == "InProgress"
    for state, health in (("Complete", "Current"), ("Failed", "Failed")):
        decision = replace(it.judge(), state=JobState(state), reason="TheEnd", training=False)
        status = job_status.status_of(it.see(), decision, it.now)
        conditions = told(status.conditions)
        assert conditions["Finished"] == ("True", "TheEnd")
        assert conditions["Reconciling"][0] == "False"
        assert kstatus({"metadata": {"generation": 1}, "status": status.to_dict()}) == health


def test_a_job_that_an_older_version_ended_is_finished(make, it) -> None:
    ended = {
        "type": "Complete", "status": "True", "reason": "Completed", "lastTransitionTime": "2026-11-21T11:50:00Z",
    }  # fmt: skip
    it.body["status"] = {"state": "Complete", "reason": "Completed", "conditions": [ended]}
    status = it.write(it.judge())
    assert told(status.conditions)["Finished"] == ("True", "Completed")
    assert it.write(it.judge()) == status
    it.body["metadata"]["generation"] = 2  # kubectl waits for a condition of the newest generation
    again = it.write(it.judge())
    assert again.observed_generation == 2
    assert {each.observed_generation for each in again.conditions} == {2}
    assert again.conditions[0].last_transition_time == "2026-11-21T11:50:00Z"


def without_data(it: Any, **more: Any) -> Decision:
    it.record = JobRecord()
    return decide(replace(it.see(), **more), it.now)


def test_a_feeder_that_cannot_be_made_is_the_jobs_reason(it) -> None:
    decision = without_data(it, obstacle=refused(QUOTA))
    assert (decision.reason, decision.stalled) == ("QuotaExceeded", True)
    assert "exceeded quota: q" in decision.message
    status = job_status.status_of(it.see(), decision, it.now)
    assert status.reason == "QuotaExceeded"
    assert told(status.conditions)["Stalled"] == ("True", "QuotaExceeded")
    assert told(status.conditions)["Reconciling"][0] == "False"
    (event,) = job_status.events(it.see(), decision, status)
    assert (event.reason, event.warning) == ("QuotaExceeded", True)
    leaving = foreign("Job", "job-1-feeder", "ours", leaving=True)
    assert not without_data(it, obstacle=leaving).stalled


@pytest.mark.parametrize(
    ("trouble", "stalled"), [(NO_IMAGE, True), (("Unschedulable", "no node"), False), (("FeederFailed", "x"), False)]
)
def test_a_feeders_pod_that_does_not_start_is_the_jobs_reason(it, trouble: tuple[str, str], stalled: bool) -> None:
    decision = without_data(it, feeder=FeederView("f", "inputs", active=True, trouble=trouble))
    assert (decision.reason, decision.stalled) == (trouble[0], stalled)


@pytest.mark.parametrize("suspend", (False, True))
def test_a_new_job_is_told_that_redis_is_away_and_others_stay_as_they_are(it, suspend: bool) -> None:
    it.redis_up = False
    it.body["spec"]["suspend"] = suspend
    decision = decide(replace(it.see(), unreadable=Unreadable("Unreachable", "Redis: away")), it.now)
    assert (decision.state, decision.reason, decision.settled) == ("Pending", "RedisUnavailable", True)
    assert "Redis: away" in decision.message
    it.write(decision)
    assert not it.judge().settled


def test_what_waits_for_an_agent_says_that_none_is_asked_for(make, it) -> None:
    it.endpoint = make.endpoint(replicas=0)
    waits = assign(it.see(), it.judge(), {}, None, 1)
    assert "endpoint tiny has spec.replicas 0: raise it" in waits.message
    it.bound()
    it.agents = {}
    it.record = replace(it.record, result=make.completed("adapter-1", 1))
    publishing = it.judge()
    assert publishing.reason == "Publishing"
    assert "endpoint tiny has spec.replicas 0: raise it" in publishing.message
    assert find_condition(job_status.status_of(it.see(), publishing, it.now).conditions, "Published") is not None
