"""What users see of what stands in the way, on a real API server with the real controllers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controllers import cannot_mount, cannot_pull, controller_manager, image, make_ready, pods
from live_operator import Cluster, Operator, eventually

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module", autouse=True)
def controllers(crds: Any, servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with controller_manager(crds, servers, tmp_path_factory.mktemp("controllers")):
        yield


def told(cluster: Cluster, kind: str, name: str, condition: str) -> tuple[str, str]:
    found = cluster.condition(kind, name, condition)
    return found["status"], found["reason"]


def waits(cluster: Cluster, what: str, condition: str, seconds: int) -> bool:
    done = cluster.api.kubectl(
        "-n", cluster.namespace, "wait", f"--for=condition={condition}", what, f"--timeout={seconds}s"
    )
    return bool(done.returncode == 0)


async def all_ready(cluster: Cluster, count: int, name: str = "agent:test") -> None:
    """Let the pods of an image become ready, one after the other as the roll-out makes them."""

    def done() -> bool:
        found = [pod for pod in pods(cluster) if image(pod) == name]
        for pod in found:
            if not any(each["type"] == "Ready" for each in pod["status"].get("conditions", [])):
                make_ready(cluster, pod)
        return len(found) == count

    await eventually(done)


async def test_a_quota_is_told_at_the_endpoint_and_at_the_job(operator: Operator, cluster: Cluster, make: Any) -> None:
    for name, hard in (("no-pods", "pods=0"), ("no-services", "services=0")):
        cluster.kubectl("create", "quota", name, f"--hard={hard}")
        await eventually(lambda name=name: (cluster.get("quota", name) or {}).get("status", {}).get("used"))
    cluster.apply(make.endpoint_body(), replicas=2)
    cluster.apply(make.job_body())
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("False", "QuotaExceeded"))
    message = cluster.condition("iep", "tiny", "Ready")["message"]
    assert "exceeded quota: no-services" in message
    assert cluster.get("deployment", "tiny") is None
    assert told(cluster, "iep", "tiny", "Stalled") == ("True", "QuotaExceeded")
    assert told(cluster, "iep", "tiny", "Reconciling") == ("False", "Stalled")
    await eventually(lambda: "QuotaExceeded" in cluster.events("tiny"))

    cluster.kubectl("delete", "quota", "no-services")
    cluster.kubectl("annotate", "iep", "tiny", "look=again")
    await eventually(lambda: cluster.get("deployment", "tiny"))
    # now it is the controllers that are refused: of the Deployment, which says so, and of the feeder, by an event
    await eventually(lambda: 'pods "tiny-' in cluster.condition("iep", "tiny", "Ready")["message"])
    assert told(cluster, "iep", "tiny", "Ready") == ("False", "QuotaExceeded")
    await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "QuotaExceeded")
    stalled = cluster.condition("ftj", "job-1", "Stalled")
    assert stalled["status"] == "True"
    assert 'pods "job-1-feeder-' in stalled["message"]
    assert "QuotaExceeded" in cluster.events("job-1")

    cluster.kubectl("delete", "quota", "no-pods")
    await eventually(lambda: pods(cluster, "coserve-feeder"), 60.0)
    await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "WaitingForData")
    assert told(cluster, "ftj", "job-1", "Stalled")[0] == "False"


async def test_ready_is_of_the_newest_spec_and_a_change_of_replicas_takes_nothing_away(
    operator: Operator, cluster: Cluster, make: Any
) -> None:
    cluster.apply(make.endpoint_body(), replicas=2)
    await all_ready(cluster, 2)
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("True", "AllAgentsReady"))
    assert told(cluster, "iep", "tiny", "Reconciling") == ("False", "Reconciled")
    before = cluster.condition("iep", "tiny", "Ready")

    cluster.kubectl("scale", "iep", "tiny", "--replicas=3")
    assert waits(cluster, "iep/tiny", "Ready", 20)
    await eventually(lambda: told(cluster, "iep", "tiny", "Reconciling") == ("True", "Scaling"))
    await eventually(lambda: len(pods(cluster)) == 3)
    ready = cluster.condition("iep", "tiny", "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "SomeAgentsReady")
    assert ready["lastTransitionTime"] == before["lastTransitionTime"]
    await all_ready(cluster, 3)
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("True", "AllAgentsReady"))

    cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", '{"spec": {"image": "agent:next"}}')
    assert not waits(cluster, "iep/tiny", "Ready", 8), "met by pods of the old image"
    assert told(cluster, "iep", "tiny", "Ready") == ("False", "RollingOut")
    assert told(cluster, "iep", "tiny", "Available") == ("True", "AgentsReady")
    assert told(cluster, "iep", "tiny", "Reconciling") == ("True", "RollingOut")
    generation = cluster.get("iep", "tiny")["metadata"]["generation"]
    assert cluster.condition("iep", "tiny", "Ready")["observedGeneration"] == generation

    (new,) = [pod for pod in pods(cluster) if image(pod) == "agent:next"]
    cannot_pull(cluster, new)
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("False", "ImagePullBackOff"))
    assert told(cluster, "iep", "tiny", "Stalled") == ("True", "ImagePullBackOff")
    assert '"agent:next": not found' in cluster.condition("iep", "tiny", "Stalled")["message"]
    await eventually(lambda: "ImagePullBackOff" in cluster.events("tiny"))

    make_ready(cluster, new)
    assert waits(cluster, "iep/tiny", "Ready", 20)
    await all_ready(cluster, 3, "agent:next")
    await eventually(lambda: told(cluster, "iep", "tiny", "Reconciling") == ("False", "Reconciled"))


FOREIGN = {
    "Deployment": ("apps/v1", "tiny", {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "x", "image": "theirs"}]}},
    }),
    "Service": ("v1", "tiny", {"ports": [{"port": 1}]}),
    "NetworkPolicy": ("networking.k8s.io/v1", "tiny", {"podSelector": {}}),
    "PodDisruptionBudget": ("policy/v1", "tiny", {"maxUnavailable": 1}),
    "ServiceAccount": ("v1", "tiny-agent", None),
    "HorizontalPodAutoscaler": ("autoscaling/v2", "tiny", {
        "maxReplicas": 2, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "x"},
    }),
    "Job": ("batch/v1", "job-1-feeder", {
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "theirs"}]}},
    }),
}  # fmt: skip


async def test_what_is_somebody_elses_is_named_and_left_alone(operator: Operator, cluster: Cluster, make: Any) -> None:
    for kind, (version, name, spec) in FOREIGN.items():
        body = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **({"spec": spec} if spec else {})}
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(body))
    before = {kind: cluster.get(kind, name) for kind, (_, name, _) in FOREIGN.items()}
    cluster.apply(make.endpoint_body(), autoscaling={"maxReplicas": 3})
    cluster.apply(make.job_body())
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("False", "NameTaken"))
    message = cluster.condition("iep", "tiny", "Ready")["message"]
    for kind, (_, name, _) in FOREIGN.items():
        if kind not in ("Job", "Deployment"):
            assert f"{kind} {name} exists and is not the endpoint's: rename or delete one of them" in message
    await eventually(lambda: "NameTaken" in cluster.events("tiny"))
    await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "NameTaken")
    said = cluster.condition("ftj", "job-1", "Stalled")
    assert said["status"] == "True"
    assert "Job job-1-feeder exists and is not this job's feeder: rename or delete one of them" in said["message"]
    assert "NameTaken" in cluster.events("job-1")

    def unchanged(kind: str, name: str) -> bool:
        now, then = cluster.get(kind, name), before[kind]
        return all(now["metadata"].get(key) == then["metadata"].get(key) for key in ("labels", "ownerReferences"))

    assert all(unchanged(kind, name) for kind, (_, name, _) in FOREIGN.items())
    for kind, (_, name, _) in FOREIGN.items():
        if kind != "Deployment":
            cluster.kubectl("delete", kind, name, "--cascade=background")
    cluster.kubectl("annotate", "iep", "tiny", "look=again")
    await eventually(lambda: "Deployment tiny exists" in cluster.condition("iep", "tiny", "Ready")["message"])
    cluster.kubectl("delete", "deployment", "tiny")
    cluster.kubectl("annotate", "iep", "tiny", "look=thrice", "--overwrite")
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("False", "AgentsStarting"))
    await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "WaitingForData", 60.0)


async def test_without_redis_everything_has_a_status_that_is_true(
    tmp_path: Path, cluster: Cluster, redis_server: Any, servers: Any, make: Any
) -> None:
    operator = Operator(tmp_path, cluster, redis_server)
    operator.env["COSERVE_REDIS_URL"] = f"redis://127.0.0.1:{servers.free_port()}/0"
    operator.start()
    try:
        cluster.apply(make.endpoint_body())
        cluster.apply(make.job_body())
        await eventually(lambda: told(cluster, "iep", "tiny", "RedisReady") == ("False", "Unreachable"))
        assert told(cluster, "iep", "tiny", "SLOMet") == ("Unknown", "NotKnown")
        assert told(cluster, "iep", "tiny", "Accepted")[0] == "True"
        await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "RedisUnavailable")
        assert cluster.status("ftj", "job-1")["state"] == "Pending"
        assert "127.0.0.1" in cluster.condition("ftj", "job-1", "Bound")["message"]
        await eventually(lambda: "RedisUnavailable" in cluster.events("job-1"))
    finally:
        operator.end()


async def test_a_secret_that_is_not_there_to_be_mounted_is_told(
    operator: Operator, cluster: Cluster, make: Any
) -> None:
    cluster.apply(make.endpoint_body())
    cluster.apply(make.job_body())
    for app, kind, name, condition in (
        ("coserve-agent", "iep", "tiny", "Ready"),
        ("coserve-feeder", "ftj", "job-1", "Stalled"),
    ):
        (pod,) = await eventually(lambda app=app: pods(cluster, app))
        cannot_mount(cluster, pod)
        await eventually(
            lambda kind=kind, name=name, condition=condition: told(cluster, kind, name, condition)[1] == "FailedMount",
            40.0,
        )
        assert 'secret "gone" not found' in cluster.condition(kind, name, condition)["message"]
    assert cluster.status("ftj", "job-1")["reason"] == "FailedMount"


async def test_a_limit_range_is_told(operator: Operator, cluster: Cluster, make: Any) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}
    body = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(body))
    cluster.apply(make.endpoint_body(), template={"resources": {"limits": {"memory": "1.5Gi"}}})
    cluster.apply(make.job_body())
    await eventually(lambda: told(cluster, "iep", "tiny", "Ready") == ("False", "LimitRangeExceeded"))
    await eventually(lambda: cluster.status("ftj", "job-1").get("reason") == "LimitRangeExceeded")
    assert "maximum memory usage per Container is 1Gi" in cluster.condition("ftj", "job-1", "Stalled")["message"]
