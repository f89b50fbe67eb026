"""When agents are replaced: not for fewer jobs, at once for what a user changed, and in turns for what we changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_operator import Cluster, Operator, eventually

from coserve_operator.decide.observed import RolloutView
from coserve_operator.decide.placement import Bound, Waiting, place, surplus
from coserve_operator.decide.rollout import jobs_at_start, needs_turn
from coserve_operator.manifests import agents
from coserve_operator.tenants import RedisAccess
from coserve_operator.watch.views import rollout_view

SERVING = RolloutView(made_from="t-1", builder="b-1", jobs=4, serves=True)


@pytest.mark.parametrize(
    ("finetuning", "template", "before", "jobs"),
    [
        ({"maxConcurrentJobs": 2}, "t-1", None, 2),
        ({"policy": "Disabled"}, "t-1", None, 0),
        ({"maxConcurrentJobs": 2}, "t-1", SERVING, 4),
        ({"policy": "Disabled"}, "t-1", SERVING, 4),
        ({"maxConcurrentJobs": 5}, "t-1", SERVING, 5),
        ({"policy": "Disabled"}, "t-2", SERVING, 0),
    ],
    ids=["new", "new without", "fewer", "off", "more", "replaced anyway"],
)
def test_agents_are_not_restarted_for_fewer_jobs(make, finetuning, template, before, jobs) -> None:
    assert jobs_at_start(make.endpoint(finetuning=finetuning), template, before) == jobs


@pytest.mark.parametrize(
    ("template", "builder", "before", "turn"),
    [
        ("t-2", "b-2", SERVING, True),
        ("t-2", "b-1", SERVING, False),
        ("t-1", "b-2", SERVING, False),
        ("t-2", "b-2", None, False),
        ("t-2", "b-2", RolloutView(made_from="t-1", builder="b-1", serves=False), False),
        ("t-2", "b-2", RolloutView(serves=True), True),
    ],
    ids=["ours", "the user's", "nothing of the pods", "new", "nothing to lose", "of an older operator"],
)
def test_only_what_we_change_has_its_turn(template, builder, before, turn) -> None:
    assert needs_turn(template, builder, before) is turn


def test_another_slowdown_is_no_other_pod(make) -> None:
    def template(finetuning: dict[str, Any]) -> Any:
        made = agents.deployment(make.endpoint(finetuning=finetuning), 1, "agent:1", RedisAccess("redis://a", "u", "p"))
        return made["spec"]["template"]

    assert template({"maxSlowdownPercent": 20}) == template({"maxSlowdownPercent": 0}) == template({})
    assert template({"maxRank": 8}) != template({})


def test_another_image_or_redis_is_another_builder() -> None:
    a, b = (RedisAccess("redis://r", "u", "p", digest=digest) for digest in "ab")
    digests = {agents.builder(image, redis) for image in ("agent:1", "agent:2") for redis in (a, b)}
    assert len(digests) == 4
    assert agents.builder("agent:1", a) in digests


def test_an_agent_with_too_many_jobs_keeps_the_important_then_the_oldest() -> None:
    held = {
        "a": [Bound("j-1", 0, ("1", "")), Bound("j-2", 1, ("2", "")), Bound("j-3", 0, ("3", ""))],
        "b": [Bound("j-4", -1, ("4", ""))],
    }
    assert surplus(held, 3) == frozenset()
    assert surplus(held, 2) == {"j-3"}
    assert surplus(held, 1) == {"j-1", "j-3"}
    assert surplus(held, 0) == {"j-1", "j-2", "j-3", "j-4"}


def test_fewer_jobs_bind_the_placement_at_once(make) -> None:
    waiting = [Waiting("j-1", ("1", ""))]
    beats = {"a": make.heartbeat("p1", max_jobs=4, jobs={"j-9": (1, 1)})}
    assert place(waiting, beats, {"j-9": "a"}, set(), 1) == {}
    assert place(waiting, beats, {"j-9": "a"}, set(), 2) == {"j-1": "a"}


def body(**status: int) -> dict[str, Any]:
    return {"metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status}


@pytest.mark.parametrize(
    ("status", "complete"),
    [
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, True),
        ({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 2}, False),
        ({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "availableReplicas": 2}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 1}, False),
    ],
)
def test_a_turn_ends_when_all_agents_are_new_and_ready(status, complete) -> None:
    view = rollout_view(body(**status))
    assert view is not None
    assert view.complete is complete


# ---- on a real API server ----


def serve(cluster: Cluster, name: str, *, updated: bool = True) -> None:
    """What the Deployment's controller would write."""
    found = cluster.get("deployment", name) or {}
    replicas = found["spec"]["replicas"]
    new = {"updatedReplicas": replicas, "availableReplicas": replicas} if updated else {"updatedReplicas": 0}
    status = {"observedGeneration": found["metadata"]["generation"], "replicas": replicas, "readyReplicas": replicas}
    words = ["patch", "deployment", name, "--subresource=status", "--type=merge", "-p"]
    cluster.kubectl(*words, json.dumps({"status": status | new}))


def image(cluster: Cluster, name: str) -> str:
    return str((cluster.get("deployment", name) or {})["spec"]["template"]["spec"]["containers"][0]["image"])


def ready(cluster: Cluster, name: str) -> str:
    return cluster.condition("iep", name, "Ready").get("message", "")


@pytest.mark.apiserver
async def test_a_new_default_image_goes_from_endpoint_to_endpoint(
    operator: Operator, cluster: Cluster, make: Any
) -> None:
    names = ["one", "three", "two"]
    for name in names:
        cluster.apply(make.endpoint_body(name))
    cluster.apply(make.endpoint_body("pinned"), image="agent:mine")
    for name in (*names, "pinned"):
        await eventually(lambda name=name: cluster.get("deployment", name))
        serve(cluster, name)
    operator.end()
    operator.env |= {"COSERVE_AGENT_IMAGE": "agent:next", "COSERVE_ROLLOUT_MAX_ENDPOINTS": "1"}
    operator.start()

    def new() -> list[str]:
        return [each for each in names if image(cluster, each) == "agent:next"]

    def waiting() -> list[str]:
        return [each for each in names if "a newer version waits" in ready(cluster, each)]

    for turn in range(1, len(names) + 1):
        await eventually(lambda turn=turn: len(waiting()) == len(names) - turn and len(new()) == turn)
        for name in new():
            serve(cluster, name)
    assert image(cluster, "pinned") == "agent:mine"


@pytest.mark.apiserver
async def test_finetuning_slower_off_and_on_again_restarts_nobody_and_a_users_change_waits_for_nobody(
    operator: Operator, cluster: Cluster, make: Any
) -> None:
    def template() -> Any:
        return (cluster.get("deployment", "tiny") or {})["spec"]["template"]

    cluster.apply(make.endpoint_body(), finetuning={"maxConcurrentJobs": 2})
    await eventually(lambda: cluster.get("deployment", "tiny"))
    serve(cluster, "tiny")
    before = template()
    slower = {"maxConcurrentJobs": 2, "maxSlowdownPercent": 20}
    for finetuning in ({"policy": "Disabled"}, {"maxConcurrentJobs": 1}, slower, {"maxConcurrentJobs": 2}):
        cluster.apply(make.endpoint_body(), finetuning=finetuning)
        generation = (cluster.get("iep", "tiny") or {})["metadata"]["generation"]
        await eventually(
            lambda generation=generation: cluster.status("iep", "tiny").get("observedGeneration") == generation
        )
        assert template() == before
    cluster.apply(make.endpoint_body(), finetuning={"maxConcurrentJobs": 3})
    await eventually(lambda: template() != before)
    before = template()
    serve(cluster, "tiny", updated=False)
    cluster.apply(make.endpoint_body(), finetuning={"maxConcurrentJobs": 3}, image="agent:mine")
    await eventually(lambda: image(cluster, "tiny") == "agent:mine")
