"""A status that others have written to, as a restore does: server-side apply would leave parts of theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from live_operator import Cluster, Operator, eventually

from coserve_operator.kube import ENDPOINT, ConflictError, Kube

pytestmark = pytest.mark.apiserver


def restore(cluster: Cluster, kind: str, name: str, **status: Any) -> None:
    body = json.dumps({"status": status})
    cluster.kubectl("patch", kind, name, "--subresource=status", "--type=merge", "-p", body)


async def test_a_status_says_what_is_whoever_wrote_it_before(cluster: Cluster, operator: Operator, make: Any) -> None:
    cluster.apply(make.endpoint_body())
    await eventually(lambda: cluster.condition("iep", "tiny", "Ready")["reason"] == "AgentsStarting")
    restore(cluster, "iep", "tiny", agents=[{"name": "gone", "jobs": ["job-1"]}], saturationPercent=55, other="kept")

    def told() -> bool:
        status = cluster.status("iep", "tiny")
        return status["agents"] == [] and "saturationPercent" not in status and status["other"] == "kept"

    await eventually(told)


async def test_a_job_that_was_restored_with_its_status_goes_on(cluster: Cluster, operator: Operator, make: Any) -> None:
    cluster.apply(make.endpoint_body())
    cluster.apply(make.job_body())
    await eventually(lambda: cluster.condition("ftj", "job-1", "Bound")["reason"] == "WaitingForData")
    lost = {"attempts": 2, "failures": 1, "step": 0, "reason": "AgentLost", "until": "2026-11-21T12:00:00Z"}
    binding = {"agent": "gone", "node": "n", "epoch": 3}
    restore(cluster, "ftj", "job-1", backoff=lost, binding=binding, startTime="2026-11-21T11:00:00Z")
    await eventually(lambda: cluster.status("ftj", "job-1").get("backoff", {}).get("attempts") == 3)
    # a back-off that ends is to go as a whole: of the one that was restored, fields that are required would be missing
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    await eventually(lambda: cluster.status("ftj", "job-1")["state"] == "Suspended")
    status = cluster.status("ftj", "job-1")
    assert "backoff" not in status
    assert (status["binding"]["epoch"], status["restarts"]) == (3, 1)


async def test_a_status_is_replaced_only_where_the_object_is_as_it_was_read(cluster: Cluster, make: Any) -> None:
    cluster.apply(make.endpoint_body())
    version = (cluster.get("iep", "tiny") or {})["metadata"]["resourceVersion"]
    configuration = Configuration()
    await config.load_kube_config(str(cluster.api.kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
    kube = Kube(ApiClient(configuration))
    try:
        await kube.replace_status(ENDPOINT, cluster.namespace, "tiny", version, {"replicas": 1})
        with pytest.raises(ConflictError):
            await kube.replace_status(ENDPOINT, cluster.namespace, "tiny", version, {"replicas": 2})
    finally:
        await kube.close()
    assert cluster.status("iep", "tiny") == {"replicas": 1}
