"""The small parts: what is written when, what a pod's state means, who leads, and what the cache of objects holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coserve_operator.apply import REFRESH_S, Applier, ForeignObjectError
from coserve_operator.budget import PROGRESS, StatusBudget
from coserve_operator.kube import BATCH_JOB, ENDPOINT, FINETUNE_JOB, POD, ConflictError, NotFoundError, UnavailableError
from coserve_operator.leader import DURATION_S, Leader, LeadershipLostError, may_take, observe
from coserve_operator.process import first_of
from coserve_operator.reconcile.endpoint import EndpointSight, status_of
from coserve_operator.reconcile.observed import RedisView
from coserve_operator.resources import endpoint as owned
from coserve_operator.views import autoscaler_report, feeder_view, pod_trouble, pod_view
from coserve_operator.world import World

# ---- budget ----


def test_a_change_of_state_is_written_at_once_and_progress_now_and_then() -> None:
    clock = [0.0]
    budget = StatusBudget(lambda: clock[0])
    old, new = {"state": "Running", "progress": {"step": 1}}, {"state": "Running", "progress": {"step": 2}}
    assert budget.delay_s("u", old, old, PROGRESS, 2.0) is None
    assert budget.delay_s("u", old, new, PROGRESS, 2.0) == 0.0
    budget.written("u")
    clock[0] = 0.5
    assert budget.delay_s("u", old, new, PROGRESS, 2.0) == 1.5
    assert budget.delay_s("u", old, {**new, "state": "Complete"}, PROGRESS, 2.0) == 0.0
    clock[0] = 2.5
    assert budget.delay_s("u", old, new, PROGRESS, 2.0) == 0.0


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


# ---- world ----


def feeder_pod(job: str, version: int = 1) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "coserve-feeder", "coserve.dev/endpoint": "tiny", "coserve.dev/job": job}
    meta = {"name": f"{job}-feeder-x", "namespace": "ml", "uid": "u", "labels": labels, "resourceVersion": str(version)}
    return {"metadata": meta}


def test_a_group_holds_an_endpoint_its_jobs_and_what_they_own(make) -> None:
    world = World()
    assert world.put(ENDPOINT, make.endpoint_body()) == {("ml", "tiny")}
    assert world.put(FINETUNE_JOB, make.job_body()) == {("ml", "tiny")}
    assert world.put(POD, feeder_pod("job-1")) == {("ml", "tiny")}
    group = world.group(("ml", "tiny"))
    assert group.endpoint is not None
    assert [job.metadata.name for job in group.jobs] == ["job-1"]
    assert (len(group.pods), list(group.feeder_pods)) == (0, ["job-1"])
    assert world.group(("ml", "other")).endpoint is None


def test_an_older_version_never_replaces_a_newer_one(make) -> None:
    world, body = World(), make.job_body()
    body["metadata"]["resourceVersion"] = "9"
    world.put(FINETUNE_JOB, body)
    old = make.job_body(endpointRef={"name": "other"})
    assert world.put(FINETUNE_JOB, old) == set()
    assert len(world.group(("ml", "tiny")).jobs) == 1


def test_a_job_that_names_another_endpoint_wakes_both_groups(make) -> None:
    world = World()
    world.put(FINETUNE_JOB, make.job_body())
    moved = make.job_body(endpointRef={"name": "other"})
    moved["metadata"]["resourceVersion"] = "2"
    assert world.put(FINETUNE_JOB, moved) == {("ml", "tiny"), ("ml", "other")}


def test_a_list_takes_away_what_is_gone_but_not_what_is_newer_than_the_list(make) -> None:
    world = World()
    for number, version in ((1, "5"), (2, "20")):
        body = make.job_body(f"job-{number}", number=number)
        body["metadata"]["resourceVersion"] = version
        world.put(FINETUNE_JOB, body)
    assert world.replace_all(FINETUNE_JOB, [], 10) == {("ml", "tiny")}
    assert [job.metadata.name for job in world.group(("ml", "tiny")).jobs] == ["job-2"]


def test_an_object_that_cannot_be_read_is_left_alone(make) -> None:
    world, body = World(), make.job_body()
    body["spec"]["training"] = {}
    assert world.put(FINETUNE_JOB, body) == set()
    assert world.groups() == set()


def test_objects_without_our_label_belong_to_nobody() -> None:
    assert World().put(BATCH_JOB, {"metadata": {"name": "x", "namespace": "ml", "resourceVersion": "1"}}) == set()


# ---- apply ----


class Sent:
    """A Kube that keeps what was sent, over what there was."""

    def __init__(self, found: Any = None) -> None:
        self.found, self.sent = found, []

    async def get(self, *_: Any) -> Any:
        if self.found is None:
            raise NotFoundError(404, "")
        return self.found

    async def apply(self, manifest: Any) -> Any:
        self.sent.append(manifest)
        self.found = manifest
        return manifest

    async def create(self, manifest: Any) -> Any:
        if self.found is not None:
            raise ConflictError(409, "")
        return await self.apply(manifest)


async def test_an_unchanged_object_is_not_sent_again_also_after_a_restart(make) -> None:
    clock, kube, service = [0.0], Sent(), owned.service(make.endpoint())
    applier = Applier(kube, lambda: clock[0])
    for _ in range(3):
        await applier.apply(service, "e-1")
    assert len(kube.sent) == 1
    await Applier(kube, lambda: 0.0).apply(service, "e-1")
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


async def test_a_secret_is_created_and_never_read(make) -> None:
    kube = Sent({"metadata": {}})
    assert await Applier(kube, lambda: 0.0).apply(owned.redis_secret(make.endpoint(), "u", "p"), "e-1") is None


# ---- leader ----


class LeaseServer:
    """A Kube with one Lease, which may be away."""

    def __init__(self) -> None:
        self.lease: Any = {"metadata": {"name": "l", "resourceVersion": "0"}, "spec": {}}
        self.away = False

    async def get(self, *_: Any) -> Any:
        if self.away:
            raise UnavailableError(0, "away")
        return {"metadata": dict(self.lease["metadata"]), "spec": dict(self.lease["spec"])}

    async def replace(self, lease: Any) -> Any:
        if self.away:
            raise UnavailableError(0, "away")
        if lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError(409, "")
        version = str(int(lease["metadata"]["resourceVersion"]) + 1)
        self.lease = {"metadata": {**lease["metadata"], "resourceVersion": version}, "spec": lease["spec"]}
        return self.lease


class Time:
    def __init__(self) -> None:
        self.now, self.naps = 0.0, 0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        if self.naps > 50:
            raise AssertionError("it waits for ever")


def leader(server: LeaseServer, name: str, time: Time) -> Leader:
    return Leader(server, "ns", "l", name, lambda: time.now, time.sleep)


async def test_a_second_replica_begins_only_after_the_first_was_silent_for_the_leases_duration() -> None:
    server, time = LeaseServer(), Time()
    await leader(server, "a", time).acquire()
    started = time.now
    await leader(server, "b", time).acquire()
    assert time.now - started >= DURATION_S
    assert server.lease["spec"]["holderIdentity"] == "b"
    assert server.lease["spec"]["leaseTransitions"] == 2


async def test_a_released_lease_is_taken_at_once() -> None:
    server, time = LeaseServer(), Time()
    first = leader(server, "a", time)
    await first.acquire()
    await first.release()
    await leader(server, "b", time).acquire()
    assert time.naps == 0


async def test_who_cannot_renew_stops_before_another_may_begin() -> None:
    server, time = LeaseServer(), Time()
    first = leader(server, "a", time)
    await first.acquire()
    server.away = True
    with pytest.raises(LeadershipLostError, match="could not be renewed"):
        await first.hold()
    assert time.now < DURATION_S


async def test_who_finds_another_name_in_the_lease_stops() -> None:
    server, time = LeaseServer(), Time()
    first = leader(server, "a", time)
    await first.acquire()
    server.lease["spec"]["holderIdentity"] = "b"
    with pytest.raises(LeadershipLostError, match="b holds"):
        await first.hold()


def test_a_lease_counts_from_when_we_saw_it_change_whatever_clock_wrote_it() -> None:
    lease = {"spec": {"holderIdentity": "b", "renewTime": "1970-01-01T00:00:00.000000Z"}}
    seen = observe(lease, None, 100.0)
    assert not may_take(seen, "a", 100.0 + DURATION_S - 1)
    assert may_take(observe(lease, seen, 200.0), "a", 200.0)


def test_a_status_says_what_each_agent_computes_on(make) -> None:
    beats = [make.heartbeat("p1", device="NVIDIA H200"), make.heartbeat("p2", ready=False)]
    sight = EndpointSight(make.endpoint(), redis=RedisView("i", {beat.agent_id: beat for beat in beats}))
    told = {agent.name: agent.device for agent in status_of(sight, make.NOW).agents}
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
