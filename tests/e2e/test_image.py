"""The whole agent image, torch and all, as `make images` builds it: too large for every run."""

from __future__ import annotations

import pytest
from demo.cluster import condition
from system import Cluster, example

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]


def test_an_endpoint_runs_on_the_agent_image_alone(cluster: Cluster) -> None:
    cluster.script("cluster", "images", "agent", seconds=2400)
    cluster.script("cluster", "load", "agent", seconds=900)
    body = example("endpoint.yaml", replicas=1)
    body["metadata"]["name"] = "whole"
    body["spec"]["image"] = "localhost/coserve-agent:dev"
    del body["spec"]["template"], body["spec"]["finetuning"]["feeder"]
    cluster.apply(body)
    cluster.wait("iep", "whole", lambda b: condition(b, "Ready").get("status") == "True", "Ready", 300)
    cluster.run("kubectl", "delete", "iep", "whole", "--wait")
