"""Agents that are deleted and rolled out anew under clients that keep their connections: no request is lost."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from demo.cluster import condition
from system import Cluster, example

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

DELETIONS, RESTARTS = 20, 3
NAME = "drained"


@pytest.fixture(scope="module")
def endpoint(cluster: Cluster) -> Iterator[None]:
    body = example("endpoint.yaml", replicas=2)
    body["metadata"]["name"] = NAME
    cluster.apply(body)
    ready_pods(cluster)
    yield
    cluster.run("kubectl", "delete", "iep", NAME, "--wait")


def ready_pods(cluster: Cluster) -> dict[str, str]:
    """Uid -> name of the two agents, once both are ready and no other is left."""
    deadline = time.monotonic() + 300
    while True:
        pods = cluster.items("pods", "-l", f"coserve.dev/endpoint={NAME},app.kubernetes.io/name=coserve-agent")
        if len(pods) == 2 and all(is_ready(pod) for pod in pods):
            return {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}
        assert time.monotonic() < deadline, json.dumps([pod["status"] for pod in pods])
        time.sleep(0.5)


def is_ready(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and condition(pod, "Ready").get("status") == "True"


def begin_load(cluster: Cluster) -> subprocess.Popen[str]:
    address = cluster.get("service", NAME)["spec"]["clusterIP"]
    return cluster.background("keep_alive.py", f"http://{address}", NAME, "6", "15")


def end_load(load: subprocess.Popen[str]) -> None:
    output, _ = load.communicate("\n", timeout=120)
    result = json.loads(output)
    print(f"{result['sent']} requests, {len(result['failed'])} failed")
    assert result["failed"] == []
    assert result["sent"] > 0


def test_deleted_agents_lose_no_request(cluster: Cluster, endpoint: None) -> None:
    load = begin_load(cluster)
    try:
        for n in range(DELETIONS):
            pods = ready_pods(cluster)
            cluster.run("kubectl", "delete", "pod", sorted(pods.values())[n % 2])
    finally:
        end_load(load)


def test_a_rollout_loses_no_request(cluster: Cluster, endpoint: None) -> None:
    load = begin_load(cluster)
    try:
        for _ in range(RESTARTS):
            before = ready_pods(cluster)
            cluster.run("kubectl", "rollout", "restart", f"deployment/{NAME}")
            cluster.run("kubectl", "rollout", "status", f"deployment/{NAME}", "--timeout=280s")
            assert not before.keys() & ready_pods(cluster).keys()
    finally:
        end_load(load)
