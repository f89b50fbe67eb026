"""The small parts: what is written when, what a pod's state means, and what the cache of objects holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coserve_operator.apply.budget import BURST_S, LOAD, PROGRESS, QUEUE, StatusBudget
from coserve_operator.apply.hindrances import ForeignObjectError
from coserve_operator.apply.objects import REFRESH_S, Applier
from coserve_operator.decide.endpoint_status import ObservedEndpoint, status_of
from coserve_operator.decide.observed import RedisView
from coserve_operator.kube import BATCH_JOB, ENDPOINT, FINETUNE_JOB, POD, ConflictError, NotFoundError
from coserve_operator.manifests import endpoint as owned
from coserve_operator.process import first_of
from coserve_operator.tenants import RedisAccess
from coserve_operator.watch.cache import Cache
from coserve_operator.watch.views import autoscaler_report, feeder_view, pod_trouble, pod_view

# ---- budget ----


RUNNING, ON, DONE = ({"state": "Running", "progress": {"step": step}} for step in (1, 2, 3))


def test_a_change_of_state_is_written_at_once_and_progress_now_and_then() -> None:
    clock = [0.0]
    budget = StatusBudget(lambda: clock[0])
    assert budget.delay_s("u", RUNNING, RUNNING, PROGRESS) is None
    assert budget.delay_s("u", RUNNING, ON, PROGRESS) == 0.0
    budget.written("u")
    clock[0] = 0.5
    assert budget.delay_s("u", RUNNING, ON, PROGRESS) == 1.5
    assert budget.delay_s("u", RUNNING, {**ON, "state": "Complete"}, PROGRESS) == 0.0
    clock[0] = 2.5
    assert budget.delay_s("u", RUNNING, ON, PROGRESS) == 0.0


@pytest.mark.parametrize(("count", "every_s"), [(10, 2), (40, 2), (1000, 50), (5000, 250)])
def test_how_often_progress_is_written_follows_the_number_of_jobs(count: int, every_s: int) -> None:
    budget = StatusBudget(lambda: 0.0)
    for number in range(count):
        budget.delay_s(f"u-{number}", RUNNING, RUNNING, PROGRESS)
        budget.delay_s(f"q-{number}", RUNNING, RUNNING, QUEUE)
    assert int(budget.progress_s()) == every_s
    for number in range(count):
        budget.forget(f"u-{number}")
    assert budget.progress_s() == PROGRESS.least_s


def test_all_figures_together_have_so_many_writes_a_second_and_a_change_of_state_waits_for_none() -> None:
    clock = [0.0]
    budget = StatusBudget(lambda: clock[0])

    def written() -> int:
        uids = [f"u-{number}" for number in range(500)]
        due = [uid for uid in uids if budget.delay_s(uid, RUNNING, ON, PROGRESS) == 0.0]
        for uid in due:
            budget.written(uid)
        return len(due)

    assert written() == PROGRESS.per_s * BURST_S
    assert written() == 0
    clock[0] = 1.0
    assert written() == PROGRESS.per_s
    ended = {**ON, "state": "Failed"}
    assert {budget.delay_s(f"u-{number}", ON, ended, PROGRESS) for number in range(500)} == {0.0}
    assert budget.delay_s("e", {"slo": 1}, {"slo": 2}, LOAD) == 0.0, "each kind has its own"


# ---- views ----


def pod(*, state: Any = None, last: Any = None, conditions: Any = (), annotations: Any = None) -> dict[str, Any]:
    status = {"name": "agent", "state": state or {}, "lastState": last or {}, "ready": False}
    return {
        "metadata": {"name": "p1", "uid": "u1", "annotations": annotations or {}},
        "spec": {"nodeName": "n"},
        "status": {"containerStatuses": [status], "conditions": list(conditions)},
    }


def test_an_agents_last_words_become_reason_and_message() -> None:
    ended = {"terminated": {"exitCode": 1, "message": "log\nModelNotFound: /models/x/y has no config.json\n"}}
    waits = {"waiting": {"reason": "CrashLoopBackOff"}}
    assert pod_trouble(pod(state=waits, last=ended)) == ("ModelNotFound", "/models/x/y has no config.json")
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    assert pod_trouble(pod(last=killed)) == ("AgentFailed", "pod p1 ended with OOMKilled (exit code 137)")


def test_images_and_places_that_do_not_exist_are_told_and_mere_starting_is_not() -> None:
    missing = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    assert pod_trouble(pod(state=missing)) == ("ImagePullBackOff", "pod p1: no such image")
    assert pod_trouble(pod(state={"waiting": {"reason": "ContainerCreating"}})) is None
    nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes have a GPU"}
    assert pod_trouble(pod(conditions=[nowhere])) == ("Unschedulable", "pod p1: 0/2 nodes have a GPU")


def test_a_leaving_pod_says_since_when_and_nonsense_says_nothing() -> None:
    assert pod_view(pod(annotations={"coserve.dev/leaving-since": "12"})).leaving_since == 12.0
    assert pod_view(pod(annotations={"coserve.dev/leaving-since": "soon"})).leaving_since is None
    assert pod_view(pod(conditions=[{"type": "Ready", "status": "True"}])).ready


def test_a_feeder_that_gave_up_tells_its_pods_last_words() -> None:
    job = {
        "metadata": {"uid": "f", "annotations": {"coserve.dev/inputs": "abc"}},
        "spec": {},
        "status": {"conditions": [{"type": "Failed", "status": "True", "message": "backoff limit"}]},
    }
    died = pod(state={"terminated": {"exitCode": 1, "message": "MemoryError"}})
    assert feeder_view(job, [died]).failure == "pod p1 ended with Error (exit code 1): MemoryError"
    assert feeder_view(job, []).failure == "backoff limit"
    assert feeder_view(job, []).inputs == "abc"


def test_an_autoscaler_without_its_metric_says_so() -> None:
    able = {"type": "AbleToScale", "status": "True"}
    active = {"type": "ScalingActive", "status": "False", "reason": "FailedGetObjectMetric", "message": "404"}
    assert autoscaler_report({"status": {"conditions": [able, active]}}) == (False, "FailedGetObjectMetric", "404")
    assert autoscaler_report({"status": {}}) is None
    assert autoscaler_report(None) is None


# ---- cache ----


def feeder_pod(job: str, version: int = 1) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "coserve-feeder", "coserve.dev/endpoint": "tiny", "coserve.dev/job": job}
    meta = {"name": f"{job}-feeder-x", "namespace": "ml", "uid": "u", "labels": labels, "resourceVersion": str(version)}
    return {"metadata": meta}


def test_a_group_holds_an_endpoint_its_jobs_and_what_they_own(make) -> None:
    cache = Cache()
    assert cache.put(ENDPOINT, make.endpoint_body()) == {("ml", "tiny")}
    assert cache.put(FINETUNE_JOB, make.job_body()) == {("ml", "tiny")}
    assert cache.put(POD, feeder_pod("job-1")) == {("ml", "tiny")}
    group = cache.group(("ml", "tiny"))
    assert group.endpoint is not None
    assert [job.metadata.name for job in group.jobs] == ["job-1"]
    assert (len(group.pods), list(group.feeder_pods)) == (0, ["job-1"])
    assert cache.group(("ml", "other")).endpoint is None


def test_an_older_version_never_replaces_a_newer_one(make) -> None:
    cache, body = Cache(), make.job_body()
    body["metadata"]["resourceVersion"] = "9"
    cache.put(FINETUNE_JOB, body)
    old = make.job_body(endpointRef={"name": "other"})
    assert cache.put(FINETUNE_JOB, old) == set()
    assert len(cache.group(("ml", "tiny")).jobs) == 1


def test_a_job_that_names_another_endpoint_wakes_both_groups(make) -> None:
    cache = Cache()
    cache.put(FINETUNE_JOB, make.job_body())
    moved = make.job_body(endpointRef={"name": "other"})
    moved["metadata"]["resourceVersion"] = "2"
    assert cache.put(FINETUNE_JOB, moved) == {("ml", "tiny"), ("ml", "other")}


def test_a_list_takes_away_what_is_gone_but_not_what_is_newer_than_the_list(make) -> None:
    cache = Cache()
    for number, version in ((1, "5"), (2, "20")):
        body = make.job_body(f"job-{number}", number=number)
        body["metadata"]["resourceVersion"] = version
        cache.put(FINETUNE_JOB, body)
    assert cache.retain(FINETUNE_JOB, set(), 10) == {("ml", "tiny")}
    assert [job.metadata.name for job in cache.group(("ml", "tiny")).jobs] == ["job-2"]


def test_an_object_that_cannot_be_read_keeps_its_place(make) -> None:
    cache, body = Cache(), make.job_body()
    body["spec"]["training"] = {}
    assert cache.put(FINETUNE_JOB, body) == {("ml", "tiny")}
    group = cache.group(("ml", "tiny"))
    assert group.jobs == ()
    (unreadable,) = group.unreadable
    assert unreadable.metadata.uid == "j-1"
    assert unreadable.fault.startswith("spec.training is {}: ")
    broken = make.job_body(endpointRef=5)
    broken["metadata"]["resourceVersion"] = "2"
    cache.put(FINETUNE_JOB, broken)
    assert [each.metadata.uid for each in cache.group(("ml", "tiny")).unreadable] == ["j-1"]
    whole = make.job_body()
    whole["metadata"]["resourceVersion"] = "3"
    cache.put(FINETUNE_JOB, whole)
    group = cache.group(("ml", "tiny"))
    assert (len(group.jobs), group.unreadable) == (1, ())


def test_what_comes_late_brings_nothing_back_and_takes_nothing_away(make) -> None:
    cache, old, new = Cache(), make.job_body(), make.job_body(number=2)
    new["metadata"]["resourceVersion"] = "20"
    cache.put(FINETUNE_JOB, old)
    cache.remove(FINETUNE_JOB, ("ml", "job-1"), "j-1")
    late = make.job_body()
    late["metadata"]["resourceVersion"] = "9"  # the answer to our own write
    assert cache.put(FINETUNE_JOB, late) == set()
    assert cache.put(FINETUNE_JOB, new) == {("ml", "tiny")}
    assert cache.remove(FINETUNE_JOB, ("ml", "job-1"), "j-1") == set()
    assert [job.metadata.uid for job in cache.group(("ml", "tiny")).jobs] == ["j-2"]


def test_objects_without_our_label_belong_to_nobody() -> None:
    assert Cache().put(BATCH_JOB, {"metadata": {"name": "x", "namespace": "ml", "resourceVersion": "1"}}) == set()


# ---- apply ----


class Sent:
    """A Kube that keeps what was sent, over what there was."""

    def __init__(self, found: Any = None) -> None:
        self.found, self.sent = found, []

    async def get(self, *_: Any) -> Any:
        if self.found is None:
            raise NotFoundError(404, "")
        return {**self.found, "metadata": {"uid": "u-1"} | self.found["metadata"]}

    async def apply(self, manifest: Any) -> Any:
        there = "u-1" if self.found is None else (await self.get())["metadata"]["uid"]
        if manifest["metadata"].get("uid", there) != there:
            raise ConflictError(409, "the UID in the precondition is another")
        self.sent.append(manifest)
        self.found = {**manifest, "metadata": manifest["metadata"] | {"uid": there}}
        return self.found

    async def create(self, manifest: Any) -> Any:
        if self.found is not None:
            raise ConflictError(409, "")
        return await self.apply(manifest)


async def test_an_unchanged_object_is_not_sent_again_before_long(make) -> None:
    clock, kube, service = [0.0], Sent(), owned.service(make.endpoint())
    applier = Applier(kube, lambda: clock[0])
    for _ in range(3):
        await applier.apply(service, "e-1")
    assert len(kube.sent) == 1
    clock[0] = REFRESH_S
    await applier.apply(service, "e-1")
    applier.forget("Service", "ml", "tiny")
    kube.found = None
    await applier.apply(service, "e-1")
    assert len(kube.sent) == 3


async def test_somebody_elses_object_is_left_alone(make) -> None:
    kube = Sent({"metadata": {"name": "tiny", "ownerReferences": [{"uid": "another", "controller": True}]}})
    with pytest.raises(ForeignObjectError, match="Service tiny exists"):
        await Applier(kube, lambda: 0.0).apply(owned.service(make.endpoint()), "e-1")
    assert kube.sent == []


async def test_an_object_that_somebody_put_in_the_place_of_ours_is_left_alone(make) -> None:
    clock, kube, service = [0.0], Sent(), owned.service(make.endpoint())
    applier = Applier(kube, lambda: clock[0])
    await applier.apply(service, "e-1")
    kube.found = {"metadata": {"name": "tiny", "uid": "u-2"}}
    clock[0] = REFRESH_S
    with pytest.raises(ForeignObjectError, match="Service tiny exists"):
        await applier.apply(service, "e-1")
    assert len(kube.sent) == 1


async def test_a_secret_is_created_and_never_read(make) -> None:
    kube = Sent({"metadata": {}})
    secret = owned.redis_secret(make.endpoint(), RedisAccess("redis://r", "u", "p"))
    assert await Applier(kube, lambda: 0.0).apply(secret, "e-1") is None


# ---- status ----


def test_a_status_says_what_each_agent_computes_on(make) -> None:
    beats = [make.heartbeat("p1", device="NVIDIA H200"), make.heartbeat("p2", ready=False)]
    observed = ObservedEndpoint(make.endpoint(), redis=RedisView("i", {beat.agent_id: beat for beat in beats}))
    told = {agent.name: agent.device for agent in status_of(observed, make.NOW).agents}
    assert told == {"p1": "NVIDIA H200", "p2": ""}


# ---- process ----


async def test_what_swallows_a_cancellation_is_cancelled_again(monkeypatch) -> None:
    monkeypatch.setattr("coserve_operator.process.CANCEL_EVERY_S", 0.01)
    swallowed = []

    async def stubborn() -> None:
        while len(swallowed) < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)
        await asyncio.Event().wait()

    async def short() -> None:
        await asyncio.sleep(0)

    assert await first_of(stubborn(), short()) == 1
    assert len(swallowed) == 2


async def test_the_error_of_the_first_part_to_end_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await first_of(asyncio.Event().wait(), fails())
