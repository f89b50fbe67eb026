"""The real HPA controller on the endpoint's own /scale, fed by the metrics API: 1 -> 2 -> 1, the job
moving on the way down.
"""

from __future__ import annotations

from typing import Any

import pytest
from system import Cluster, condition, example

pytestmark = pytest.mark.e2e


def replicas(count: int) -> Any:
    return lambda body: body["status"].get("readyReplicas") == count and body["spec"]["replicas"] == count


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
    cluster.wait("iep", "elastic", lambda b: condition(b, "Ready").get("status") == "True", "Ready", 180)
    url = f"http://{cluster.get('service', 'elastic')['spec']['clusterIP']}"
    load = cluster.background("load.py", url, "elastic", "24", "100")
    try:
        cluster.wait("iep", "elastic", replicas(2), "a second replica", 120)
    finally:
        output, _ = load.communicate(timeout=300)
    assert "0 failed" in output
    cluster.wait("iep", "elastic", replicas(1), "one replica again", 180)
    cluster.run("kubectl", "delete", "iep", "elastic", "--wait")
