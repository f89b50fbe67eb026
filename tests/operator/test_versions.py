"""Objects of a later version: the operator that cannot read one leaves it as it is, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from live_operator import Cluster, bound, eventually, feed
from redis.asyncio import Redis

from coserve_api.generate import definitions, frozen_once_started
from coserve_contract.keys import Keys
from coserve_contract.store import Store

pytestmark = pytest.mark.apiserver
JOBS = definitions()["finetunejobs.yaml"]


def later() -> dict[str, Any]:
    """The CRD of jobs as a later version may have it: a higher priority, which may change, and more fields; one of
    them optional, and not to be changed once the job has started.
    """
    definition: dict[str, Any] = json.loads(json.dumps(JOBS))
    (version,) = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["x-kubernetes-validations"] = frozen_once_started(["optional"])
    schema["properties"]["spec"]["properties"]["optional"] = {"type": "string"}
    schema["properties"]["spec"]["properties"]["priority"]["maximum"] = 9
    schema["properties"]["spec"]["properties"]["fromTheFuture"] = {"type": "string", "default": "new"}
    return definition


@pytest.fixture
def crd_of_jobs(crds: Any) -> Iterator[Any]:
    def replace(definition: dict[str, Any]) -> None:
        done = crds.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(definition))
        assert done.returncode == 0, done.stderr

    yield replace
    replace(JOBS)


async def test_a_job_of_a_later_version_goes_on_and_is_taken_up_again(
    served: Any, cluster: Cluster, crd_of_jobs: Any, redis: Redis, make: Any
) -> None:
    agent = served.agent("p1")
    cluster.apply(make.job_body())
    uid = await feed(served, cluster)
    assert await bound(cluster, "job-1", 1) == "p1"
    await agent.run(uid, 1)
    await eventually(lambda: cluster.condition("ftj", "job-1", "Running")["status"] == "True")
    cluster.kubectl(
        "patch", "ftj", "job-1", "--subresource=status", "--type=merge", "-p", '{"status": {"new": {"a": 1}}}'
    )

    crd_of_jobs(later())

    def raised() -> bool:
        done = cluster.api.kubectl(
            "-n", cluster.namespace, "patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"priority": 9}}'
        )
        return bool(done.returncode == 0)

    await eventually(raised)
    said = await eventually(lambda: cluster.condition("ftj", "job-1", "Accepted")["status"] == "False")
    assert said
    accepted = cluster.condition("ftj", "job-1", "Accepted")
    assert accepted["reason"] == "Unreadable"
    assert accepted["message"].startswith("spec.priority is 9: ")
    before = cluster.status("ftj", "job-1")
    cluster.kubectl("annotate", "iep", "tiny", "look=again")  # a reconcile of the group
    cluster.apply(make.job_body("job-2"), priority=1)
    await eventually(lambda: cluster.status("ftj", "job-2").get("state"))
    store = Store(redis, Keys(served.endpoint_uid))
    record = await store.job(uid)
    assert record.fence is not None
    assert (record.fence.epoch, record.fence.agent) == (1, agent.id)
    assert uid in await store.job_uids()
    assert cluster.status("ftj", "job-1")["binding"] == before["binding"]

    changed = cluster.api.kubectl(
        "-n", cluster.namespace, "patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"optional": "x"}}'
    )
    assert "optional is immutable once the job has started" in changed.stderr
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"priority": 0}}')
    await eventually(lambda: cluster.condition("ftj", "job-1", "Accepted")["status"] == "True")
    status = cluster.status("ftj", "job-1")
    assert status["binding"]["epoch"] == 1
    assert status["new"] == {"a": 1}
    assert cluster.get("ftj", "job-1")["spec"]["fromTheFuture"] == "new"
