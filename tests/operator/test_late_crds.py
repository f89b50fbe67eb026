"""An operator that is there before its CRDs, as in any order of installing; kopf alone would never watch them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from live_operator import Cluster, Operator, eventually
from redis.asyncio import Redis

CRDS = ("inferenceendpoints.coserve.dev", "finetunejobs.coserve.dev")
FOLDER = Path(__file__).parents[2] / "crds"


@pytest.mark.apiserver
async def test_crds_that_come_later_are_watched(
    tmp_path: Path, cluster: Cluster, redis: Redis, redis_server: Any, make: Any
) -> None:
    cluster.kubectl("delete", "crd", *CRDS, "--wait=true")
    operator = Operator(tmp_path, cluster, redis_server)
    operator.start()
    try:
        for missing in (" and ".join(CRDS), CRDS[1]):
            await eventually(lambda missing=missing: f"no CRD {missing}: apply it" in operator.log(1), 60)
            name = missing.partition(" ")[0]
            cluster.kubectl("apply", "--server-side", "-f", str(FOLDER / f"{name.partition('.')[0]}.yaml"))
            cluster.kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=30s")
        await eventually(lambda: cluster.api.kubectl("get", "ftj,iep").returncode == 0)
        await eventually(lambda: "authentication has finished" in operator.log(1))  # and the watches begin
        cluster.apply(make.endpoint_body())
        cluster.apply(make.job_body())
        await eventually(lambda: cluster.condition("iep", "tiny", "Ready")["reason"] == "AgentsStarting")
        await eventually(lambda: cluster.condition("ftj", "job-1", "Bound")["reason"] == "WaitingForData")
    finally:
        operator.end()
        print(operator.log(1))
    assert "Unresolved" not in operator.log(1)
