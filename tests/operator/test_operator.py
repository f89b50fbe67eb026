"""The operator as a process, against a real API server and a real Redis; the test plays the agents."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_operator import SHA, Agent, Cluster, Operator, eventually
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coserve_api.connect import command
from coserve_api.keys import Keys
from coserve_api.messages import (
    AdapterFiles,
    Checkpoint,
    Completed,
    Desired,
    FeedStatus,
    Progress,
    Released,
)
from coserve_api.scripts import Refused
from coserve_api.store import Store

pytestmark = pytest.mark.apiserver
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crds(api_server: Any) -> Any:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        applied = api_server.kubectl("apply", "--server-side", "-f", str(path))
        assert applied.returncode == 0, applied.stderr
        crd = f"crd/{path.stem}.coserve.dev"
        assert api_server.kubectl("wait", "--for=condition=Established", crd, "--timeout=30s").returncode == 0
    return api_server


@pytest.fixture
def cluster(crds: Any, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    name = f"it-{abs(hash(request.node.name)) % 10_000_000}"
    assert crds.kubectl("create", "namespace", name).returncode == 0
    yield Cluster(crds, name)
    crds.kubectl("-n", name, "delete", "ftj,iep", "--all", "--wait=false")


@pytest.fixture
def operator(tmp_path: Path, cluster: Cluster, redis: Redis, redis_server: Any) -> Iterator[Operator]:
    made = Operator(tmp_path, cluster, redis_server)
    made.start()
    yield made
    made.end()
    for number in range(1, made.count + 1):
        print(f"--- operator {number}\n{made.log(number)}")
        assert "a fault of the operator" not in made.log(number)


@pytest.fixture
async def served(operator: Operator, cluster: Cluster, redis_server: Any, make: Any) -> AsyncIterator[Any]:
    """An endpoint with its Redis user, and `agent(pod)` to add an agent."""
    cluster.apply(make.endpoint_body(), replicas=2)
    secret = await eventually(lambda: cluster.get("secret", "tiny-redis"))
    assert secret is not None
    username, password = (b64decode(secret["data"][key]).decode() for key in ("username", "password"))
    uid = (cluster.get("iep", "tiny") or {})["metadata"]["uid"]
    client = redis_server.connect(username, password)
    agents: list[Agent] = []

    class Served:
        keys = Keys(uid)
        store = Store(client, Keys(uid))
        endpoint_uid = uid

        @staticmethod
        def agent(pod: str, boot: str = "b1") -> Agent:
            agents.append(Agent(client, uid, pod, boot))
            return agents[-1]

    async def registered() -> Any:
        with contextlib.suppress(RedisError):
            return await Served.store.incarnation()

    await eventually(registered)
    yield Served()
    for agent in agents:
        await agent.stop()
    await client.aclose()


async def test_an_endpoint_gets_everything_that_it_owns(served: Any, cluster: Cluster) -> None:
    kinds = {
        "deployment": "tiny", "service": "tiny", "pdb": "tiny", "networkpolicy": "tiny", "serviceaccount": "tiny-agent",
        "secret": "tiny-redis",
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


async def feed(served: Any, cluster: Cluster, name: str = "job-1") -> str:
    """Play the feeder; return the job's uid."""
    feeder = await eventually(lambda: cluster.get("job", f"{name}-feeder"))
    assert feeder["spec"]["template"]["spec"]["containers"][0]["command"][1:] == ["-m", "coserve_agent.feeder"]
    uid = str(cluster.get("ftj", name)["metadata"]["uid"])
    await served.store.set_feed(uid, FeedStatus(total_steps=10, samples=80, eval_samples=4))
    return uid


async def bound(cluster: Cluster, name: str, epoch: int) -> str:
    """Wait until the job is bound under `epoch`; return the pod."""

    def binding() -> str | None:
        found = cluster.status("ftj", name).get("binding", {})
        return found.get("agent") if found.get("epoch") == epoch else None

    return str(await eventually(binding, 25.0))


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
    await eventually(served.store.adapters, 15.0)


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

    await eventually(gone, 30.0)


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
