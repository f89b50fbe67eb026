"""The operator as a process, against a real API server and a real Redis; the test plays the agents."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from live_operator import SHA, Cluster, Operator, bound, eventually, feed
from redis.asyncio import Redis

from coserve_api.job import PublishPolicy
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import (
    AdapterFiles,
    Checkpoint,
    Completed,
    Desired,
    FeedStatus,
    Progress,
    Released,
)
from coserve_contract.scripts import Refused

pytestmark = pytest.mark.apiserver
ROOT = Path(__file__).parents[2]


async def test_an_endpoint_gets_everything_that_it_owns(served: Any, cluster: Cluster) -> None:
    kinds = {
        "deployment": "tiny", "service": "tiny", "pdb": "tiny", "networkpolicy": "tiny", "serviceaccount": "tiny-agent",
        "secret": cluster.redis_secret("tiny")["name"],
    }  # fmt: skip
    for kind, name in kinds.items():
        found = cluster.get(kind, name)
        assert found is not None, kind
        assert found["metadata"]["ownerReferences"][0]["uid"] == served.endpoint_uid
    deployment = cluster.get("deployment", "tiny")
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "agent:test"
    status = await eventually(lambda: cluster.status("iep", "tiny"))
    assert status["selector"] == "app.kubernetes.io/name=coserve-agent,coserve.dev/endpoint=tiny"
    assert status["url"] == f"http://tiny.{cluster.namespace}.svc"
    assert cluster.condition("iep", "tiny", "Ready")["reason"] == "AgentsStarting"
    endpoint = cluster.get("iep", "tiny")
    assert "finalizers" not in endpoint["metadata"]
    assert [each for each in endpoint["metadata"]["annotations"] if "kopf" in each] == []

    cluster.kubectl("delete", "service", "tiny")
    await eventually(lambda: cluster.get("service", "tiny"))
    cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", '{"spec": {"autoscaling": {"maxReplicas": 3}}}')
    await eventually(lambda: cluster.get("hpa", "tiny"))
    cluster.kubectl("patch", "iep", "tiny", "--type=json", "-p", '[{"op": "remove", "path": "/spec/autoscaling"}]')
    await eventually(lambda: cluster.get("hpa", "tiny") is None)
    cluster.kubectl("scale", "iep", "tiny", "--replicas=3")
    await eventually(lambda: cluster.get("deployment", "tiny")["spec"]["replicas"] == 3)


async def test_a_jobs_life_over_a_lost_agent_an_emptied_redis_and_a_killed_operator(
    served: Any, cluster: Cluster, operator: Operator, redis: Redis, make: Any
) -> None:
    agents = {pod: served.agent(pod) for pod in ("p1", "p2")}
    cluster.apply(make.job_body(), checkpoint={"everySteps": 1})
    uid = await feed(served, cluster)

    # bound under epoch 1, and at work
    first = agents[await bound(cluster, "job-1", 1)]
    binding = await eventually(lambda: first.binding(uid))
    assert (binding.epoch, binding.desired, binding.spec.adapter_number, binding.resume) == (1, Desired.RUN, 1, None)
    await first.run(uid, 1)
    assert (
        await first.fencing.report_progress(uid, Progress(epoch=1, step=4, cursor=4, total_steps=10, loss=1.5)) is None
    )
    saved = Checkpoint(step=4, cursor=4, epoch=1, path=f"jobs/{uid}/e1/s4", sha256=SHA)
    assert await first.fencing.accept_checkpoint(uid, 1, saved) is None
    await eventually(lambda: cluster.status("ftj", "job-1").get("progress", {}).get("step") == 4)
    status = await eventually(lambda: (s := cluster.status("ftj", "job-1")).get("reason") == "Training" and s)
    assert status["checkpoint"]["uri"] == f"pvc://artifacts/store/jobs/{uid}/e1/s4"
    assert cluster.condition("ftj", "job-1", "DataReady")["status"] == "True"
    refused = cluster.api.kubectl(
        "-n", cluster.namespace, "patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"adapter": {"rank": 4}}}'
    )
    assert refused.returncode != 0, "a job that has started is immutable"

    # its agent is lost: epoch 2 elsewhere, from the checkpoint
    await first.stop()
    second = agents[await bound(cluster, "job-1", 2)]
    assert second is not first
    binding = await eventually(lambda: second.binding(uid))
    assert binding.resume == saved
    assert cluster.status("ftj", "job-1")["restarts"] == 1
    await second.run(uid, 2, step=5)
    assert isinstance(await first.fencing.renew_lease(uid, 1), Refused)

    # Redis is emptied, and the operator killed: the same epoch goes on
    operator.processes[0].send_signal(signal.SIGKILL)
    operator.processes[0].wait(20)
    old = second.fencing.incarnation
    await command(redis, "FLUSHALL")
    await served.store.set_feed(uid, FeedStatus(total_steps=10, samples=80, eval_samples=4))
    operator.start()
    binding = await eventually(lambda: second.binding(uid), 60.0)
    assert (binding.epoch, binding.resume) == (2, saved)
    await eventually(lambda: second.fencing.incarnation not in ("", old))
    await second.run(uid, 2, step=6)
    assert cluster.status("ftj", "job-1")["restarts"] == 1

    # done: published once every ready agent has it
    files = AdapterFiles(name="adapter-1", number=1, path="adapters/e-1/adapter-1/v1", sha256=SHA)
    result = Completed(epoch=2, step=10, tokens=500, adapter=files, loss=0.5, eval_loss=0.75)
    assert await second.fencing.finish(uid, result) is None
    second.jobs.clear()
    await eventually(lambda: cluster.condition("ftj", "job-1", "Complete")["status"] == "True")
    status = cluster.status("ftj", "job-1")
    assert (status["state"], status["progress"]["percent"], status["progress"]["evalLoss"]) == ("Complete", 100, "0.75")
    assert status["adapter"]["uri"] == "pvc://artifacts/store/adapters/e-1/adapter-1/v1"
    assert cluster.condition("ftj", "job-1", "Published")["status"] == "True"

    def served_everywhere() -> bool:
        adapters = cluster.status("iep", "tiny").get("adapters", [])
        return [(each["name"], each["readyAgents"], each["rank"]) for each in adapters] == [("adapter-1", 1, 8)]

    await eventually(served_everywhere)
    assert {"Bound", "AgentLost", "Complete", "Published"} <= set(cluster.events("job-1"))

    # what is over leaves nothing in Redis but the adapter, which outlives its job
    await eventually(lambda: no_keys(redis, uid))
    cluster.kubectl("delete", "ftj", "job-1")
    await asyncio.sleep(1.5)
    assert list(await served.store.adapters()) == ["adapter-1"]
    await command(redis, "DEL", served.keys.adapters())
    await command(redis, "DEL", served.keys.incarnation())
    await eventually(served.store.adapters)


async def test_a_running_job_hears_of_changes_and_one_that_is_over_goes_in_its_time(
    served: Any, cluster: Cluster, make: Any
) -> None:
    agent = served.agent("p1")
    cluster.apply(make.job_body())
    uid = await feed(served, cluster)
    await bound(cluster, "job-1", 1)
    await agent.run(uid, 1)
    spec = {"priority": 2, "checkpoint": {"everySteps": 3, "keep": 4}, "publish": {"policy": "Never"}}
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", json.dumps({"spec": spec}))
    finetuning = {"spec": {"finetuning": {"maxSlowdownPercent": 20}}}
    cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", json.dumps(finetuning))

    async def told() -> bool:
        binding = await agent.binding(uid)
        assert binding is not None
        live = {"priority": 2, "checkpoint_every_steps": 3, "checkpoint_keep": 4, "publish": "Never"}
        live |= {"max_slowdown_percent": 20}
        return (binding.epoch, binding.spec.live) == (1, live)

    await eventually(told)
    # the agent had published before it looked
    files = AdapterFiles(name="adapter-1", number=1, path="adapters/e-1/adapter-1/v1", sha256=SHA)
    result = Completed(epoch=1, step=10, adapter=files, publish=PublishPolicy.ALWAYS)
    assert await agent.fencing.finish(uid, result) is None
    agent.jobs.clear()
    await eventually(lambda: cluster.condition("ftj", "job-1", "Complete")["status"] == "True")
    await asyncio.sleep(1.0)
    assert cluster.get("ftj", "job-1") is not None
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"ttlSecondsAfterFinished": 1}}')
    await eventually(lambda: cluster.get("ftj", "job-1") is None)
    assert [each["name"] for each in cluster.status("iep", "tiny")["adapters"]] == ["adapter-1"]
    assert list(await served.store.adapters()) == ["adapter-1"]


async def no_keys(redis: Redis, uid: str) -> bool:
    return await command(redis, "KEYS", f"*{uid}*") == []


async def test_jobs_queue_suspend_fail_and_vanish(served: Any, cluster: Cluster, redis: Redis, make: Any) -> None:
    agent = served.agent("p1")
    for number in (1, 2):
        cluster.apply(make.job_body(f"job-{number}", number=number))
    one, two = [await feed(served, cluster, f"job-{number}") for number in (1, 2)]
    assert await bound(cluster, "job-1", 1) == "p1"
    await eventually(lambda: cluster.status("ftj", "job-2").get("reason") == "NoCapacity")
    await agent.run(one, 1)

    # suspended: given back, and the next in the queue gets the agent
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"suspend": true}}')

    async def stopped() -> bool:
        told = await agent.binding(one)
        return told is not None and told.desired is Desired.STOP

    await eventually(stopped)
    assert await agent.fencing.finish(one, Released(epoch=1, step=1)) is None
    agent.jobs.clear()
    assert await bound(cluster, "job-2", 1) == "p1"
    assert cluster.condition("ftj", "job-1", "Suspended")["status"] == "True"
    assert cluster.get("job", "job-1-feeder")["spec"]["suspend"] is True
    assert cluster.status("ftj", "job-1").get("restarts", 0) == 0

    # deleted while it is bound: nothing of it stays, and the first goes on
    cluster.kubectl("delete", "ftj", "job-2")
    await eventually(lambda: no_keys(redis, two))
    assert await agent.binding(two) is None
    cluster.kubectl("patch", "ftj", "job-1", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    assert await bound(cluster, "job-1", 2) == "p1"

    # a rank that the endpoint does not allow, and an endpoint that does not exist
    cluster.apply(make.job_body("job-3", number=3, adapter={"name": "big", "rank": 128}))
    await eventually(lambda: cluster.status("ftj", "job-3").get("reason") == "RankTooLarge")
    cluster.apply(make.job_body("job-4", number=4, endpointRef={"name": "nowhere"}))
    await eventually(lambda: cluster.status("ftj", "job-4").get("reason") == "EndpointNotFound")

    # an endpoint that goes takes its keys and its Redis user with it
    cluster.kubectl("delete", "iep", "tiny")
    await agent.stop()

    async def gone() -> bool:
        users = [raw.decode() for raw in await command(redis, "ACL", "USERS")]
        return f"cs-{served.endpoint_uid}" not in users and await no_keys(redis, served.endpoint_uid)

    await eventually(gone)


async def test_a_scale_down_moves_the_job_first(served: Any, cluster: Cluster, make: Any) -> None:
    labels = {"app.kubernetes.io/name": "coserve-agent", "coserve.dev/endpoint": "tiny"}
    agents = {}
    for pod in ("p1", "p2"):
        spec = {
            "containers": [{"name": "agent", "image": "agent:test"}],
            "nodeName": "node-1",
            "automountServiceAccountToken": False,
        }
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "labels": labels}, "spec": spec}
        await eventually(
            lambda body=body: cluster.api.kubectl("-n", cluster.namespace, "get", "sa", "tiny-agent").returncode == 0
        )
        body["spec"]["serviceAccountName"] = "tiny-agent"
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(body))
        ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}], "phase": "Running"}}
        cluster.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "-p", json.dumps(ready))
        uid = cluster.get("pod", pod)["metadata"]["uid"]
        agent = served.agent(pod)
        agent.more = {}
        agents[pod] = agent
        agent.pod_uid = uid
    cluster.apply(make.job_body())
    uid = await feed(served, cluster)
    holder = agents[await bound(cluster, "job-1", 1)]
    await holder.run(uid, 1)
    other = next(agent for agent in agents.values() if agent is not holder)
    # the idle agent is the one that goes, at once
    cluster.kubectl("scale", "iep", "tiny", "--replicas=1")
    await eventually(lambda: cluster.get("deployment", "tiny")["spec"]["replicas"] == 1)
    marked = cluster.get("pod", other.pod)["metadata"]["annotations"]
    assert marked["controller.kubernetes.io/pod-deletion-cost"] == str(-(2**31))
    kept = cluster.get("pod", holder.pod)["metadata"].get("annotations", {})
    assert "controller.kubernetes.io/pod-deletion-cost" not in kept


async def test_for_an_endpoint_that_is_being_deleted_nothing_is_made(served: Any, cluster: Cluster, make: Any) -> None:
    """As in a deletion in the foreground: what it owns goes first."""
    served.agent("p1")
    finalizers = '{"metadata": {"finalizers": ["example.com/hold"]}}'
    cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", finalizers)
    cluster.kubectl("delete", "iep", "tiny", "--wait=false")
    await eventually(lambda: "deletionTimestamp" in cluster.get("iep", "tiny")["metadata"])
    cluster.kubectl("delete", "service,deployment", "tiny")
    cluster.apply(make.job_body())
    await eventually(lambda: "tiny is being deleted" in cluster.condition("ftj", "job-1", "Bound").get("message", ""))
    await asyncio.sleep(3.0)
    assert [cluster.get(kind, "tiny") for kind in ("service", "deployment")] == [None, None]
    assert cluster.get("job", "job-1-feeder") is None
    cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    await eventually(lambda: "is not in namespace" in cluster.condition("ftj", "job-1", "Bound")["message"])
    assert cluster.status("ftj", "job-1")["reason"] == "EndpointNotFound"


async def test_a_tenant_who_writes_rubbish_is_told_and_disturbs_nobody(
    served: Any, cluster: Cluster, operator: Operator, redis_server: Any, make: Any
) -> None:
    cluster.apply(make.endpoint_body("bad"))
    uid = await eventually(lambda: (cluster.get("iep", "bad") or {}).get("metadata", {}).get("uid"))
    secret = await eventually(lambda: cluster.redis_secret("bad"))
    tenant = redis_server.connect(secret["username"], secret["password"])

    def told() -> str:
        condition = cluster.condition("iep", "bad", "RedisReady")
        return str(condition["status"] == "False" and condition["reason"] == "InvalidContent" and condition["message"])

    try:
        await eventually(lambda: cluster.condition("iep", "bad", "RedisReady")["status"] == "True")
        await command(tenant, "ZADD", Keys(uid).agents(), 1, "a:b")
        await eventually(lambda: "'a:b'" in told())
        await command(tenant, "SET", Keys(uid).agents(), "x")
        await eventually(lambda: f"key {Keys(uid).agents()}: WRONGTYPE" in told())
        served.agent("p1")
        cluster.apply(make.job_body())
        await feed(served, cluster)
        assert await bound(cluster, "job-1", 1) == "p1"
        assert operator.processes[0].poll() is None
        await command(tenant, "DEL", Keys(uid).agents())
        await eventually(lambda: cluster.condition("iep", "bad", "RedisReady")["status"] == "True")
    finally:
        await tenant.aclose()


async def test_a_replica_that_waits_ends_when_told_to(cluster: Cluster, operator: Operator) -> None:
    await eventually(lambda: "operator-1 leads" in operator.log(1))
    waiting = operator.start()
    await eventually(lambda: "waits for Lease" in operator.log(2))
    waiting.terminate()
    assert waiting.wait(10) == 0
    assert operator.processes[0].poll() is None


async def test_a_replica_whose_lease_is_taken_ends_with_an_error(cluster: Cluster, operator: Operator) -> None:
    await eventually(lambda: "operator-1 leads" in operator.log(1))
    patch = json.dumps({"spec": {"holderIdentity": "somebody"}})
    cluster.kubectl("patch", "lease", "coserve-operator", "--type=merge", f"-p={patch}")
    assert operator.processes[0].wait(20) == 1
    assert "LeadershipLostError: somebody holds the Lease now" in operator.log(1)
    assert cluster.get("lease", "coserve-operator")["spec"]["holderIdentity"] == "somebody"


async def test_a_second_replica_takes_over_when_the_first_ends(
    served: Any, cluster: Cluster, operator: Operator, make: Any
) -> None:
    operator.start()
    await eventually(lambda: "waits for Lease" in operator.log(2))
    assert "leads" not in operator.log(2)
    operator.processes[0].terminate()
    assert operator.processes[0].wait(20) == 0
    await eventually(lambda: "operator-2 leads" in operator.log(2), 10.0)
    served.agent("p1")
    cluster.apply(make.job_body())
    await feed(served, cluster)
    assert await bound(cluster, "job-1", 1) == "p1"
