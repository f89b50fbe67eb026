"""The real HPA controller on the endpoint's own /scale, fed by the metrics API; jobs that move when a replica goes."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import pytest
from demo.cluster import condition
from system import Cluster, example, step

pytestmark = pytest.mark.e2e
METRIC = (
    "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/inferenceendpoints.coserve.dev/{}/slo_saturation_percent"
)


def replicas(count: int) -> Any:
    return lambda body: body["status"].get("readyReplicas") == count and body["spec"]["replicas"] == count


def is_ready(body: dict[str, Any]) -> bool:
    return condition(body, "Ready").get("status") == "True"


def url(cluster: Cluster, name: str) -> str:
    return f"http://{cluster.get('service', name)['spec']['clusterIP']}"


def saturation(cluster: Cluster, name: str) -> float:
    """The metric as the HPA controller reads it, in percent."""
    value = json.loads(cluster.run("kubectl", "get", "--raw", METRIC.format(name)))["items"][0]["value"]
    return float(value[:-1]) / 1000 if value.endswith("m") else float(value)


def running_first(cluster: Cluster, *names: str) -> list[str]:
    """The jobs in this order once one of them runs and the others wait."""
    deadline = time.monotonic() + 60
    while True:
        states = {name: cluster.get("ftj", name)["status"]["state"] for name in names}
        if sorted(states.values()) == ["Pending"] * (len(names) - 1) + ["Running"]:
            return sorted(names, key=lambda name: states[name] != "Running")
        assert time.monotonic() < deadline, states
        time.sleep(0.5)


def job(name: str, endpoint: str) -> dict[str, Any]:
    """A job that ends with the test."""
    training = {"maxSteps": 100_000, "batchSize": 4, "learningRate": "1e-3", "warmupSteps": 0}
    body = example("job.yaml", training=training, checkpoint={"everySteps": 10}, adapter={"name": name})
    body["metadata"]["name"] = name
    body["spec"]["endpointRef"]["name"] = endpoint
    return body


def test_saturation_adds_a_replica_and_its_end_takes_it_away(cluster: Cluster) -> None:
    behavior = {"scaleUp": {"stabilizationWindow": "5s"}, "scaleDown": {"stabilizationWindow": "15s"}}
    body = example(
        "endpoint.yaml",
        replicas=1,
        slo={"timeToFirstToken": "500ms", "timePerOutputToken": "100ms"},
        engine={"kvCacheMemory": "4Mi"},
        autoscaling={"minReplicas": 1, "maxReplicas": 2, "targetSaturationPercent": 60, "behavior": behavior},
    )
    body["metadata"]["name"] = "elastic"
    cluster.apply(body)
    refused = cluster.run("kubectl", "get", "--raw", METRIC.format("elastic"), check=False)
    assert refused == ""  # no agent has reported yet: no data is not zero
    cluster.wait("iep", "elastic", is_ready, "Ready", 180)
    load = cluster.background("load.py", url(cluster, "elastic"), "elastic", "24", "100")
    try:
        cluster.wait("iep", "elastic", replicas(2), "a second replica", 120)
    finally:
        output, _ = load.communicate(timeout=300)
    assert "0 failed" in output
    cluster.wait("iep", "elastic", replicas(1), "one replica again", 180)
    cluster.run("kubectl", "delete", "iep", "elastic", "--wait")


def test_saturation_is_the_same_with_finetuning_on_and_off_and_jobs_move_when_a_replica_goes(cluster: Cluster) -> None:
    body = example("endpoint.yaml", replicas=1)
    body["metadata"]["name"] = "even"
    cluster.apply(body)
    cluster.wait("iep", "even", is_ready, "Ready", 180)

    def under_load() -> float:
        load = cluster.background("load.py", url(cluster, "even"), "even", "4", "40")
        time.sleep(18)  # the metric is an average over 15 s
        values = []
        for _ in range(10):
            values.append(saturation(cluster, "even"))
            time.sleep(1.5)
        output, _ = load.communicate(timeout=120)
        assert "0 failed" in output
        return statistics.mean(values)

    off = under_load()
    cluster.apply(job("first", "even"))
    cluster.wait("ftj", "first", lambda b: step(b) > 0, "a step", 90)
    on = under_load()
    assert cluster.get("ftj", "first")["status"]["state"] == "Running"
    assert abs(on - off) <= 5, f"saturation {off:.1f} % without finetuning, {on:.1f} % with it"

    cluster.apply(job("second", "even"))
    waiting = cluster.wait(
        "ftj", "second", lambda b: condition(b, "Bound").get("reason") == "NoCapacity", "NoCapacity", 60
    )
    assert waiting["status"]["state"] == "Pending"
    cluster.run("kubectl", "scale", "iep", "even", "--replicas=2")
    cluster.wait("ftj", "second", lambda b: b["status"]["state"] == "Running", "Running on the second agent", 120)
    cluster.run("kubectl", "scale", "iep", "even", "--replicas=1")
    cluster.wait("iep", "even", replicas(1), "one replica again", 120)
    moved = [cluster.get("ftj", name)["status"] for name in ("first", "second")]
    assert [status["restarts"] for status in moved] == [0, 0]  # giving a job back is no failure
    stays, moves = running_first(cluster, "first", "second")
    reached = cluster.get("ftj", moves)["status"].get("checkpoint", {}).get("step", 0)
    cluster.run("kubectl", "delete", "ftj", stays, "--wait")
    gone_on = cluster.wait(
        "ftj", moves, lambda b: b["status"]["state"] == "Running" and step(b) > reached, "steps on the other agent", 120
    )
    assert gone_on["status"]["restarts"] == 0
    cluster.run("kubectl", "delete", "ftj", moves, "--wait")
    cluster.run("kubectl", "delete", "iep", "even", "--wait")
