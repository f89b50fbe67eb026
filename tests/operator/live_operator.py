"""The operator as a process, an API server with words for what the tests do, and agents that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from coserve_contract.keys import Keys, agent_id
from coserve_contract.messages import Binding, FeedStatus, Heartbeat, JobBeat
from coserve_contract.scripts import Fencing, Lease
from coserve_contract.store import Store

SHA = "0123456789abcdef" * 4


class Cluster:
    """kubectl with words for what the tests do."""

    def __init__(self, api_server: Any, namespace: str) -> None:
        self.api, self.namespace = api_server, namespace

    def kubectl(self, *words: str, stdin: str = "") -> str:
        done = self.api.kubectl("-n", self.namespace, *words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def apply(self, body: dict[str, Any], **spec: Any) -> None:
        metadata = {"name": body["metadata"]["name"], "namespace": self.namespace}
        body = {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "metadata": metadata,
            "spec": body["spec"] | spec,
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        done = self.api.kubectl("-n", self.namespace, "get", kind, name, "-o", "json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def status(self, kind: str, name: str) -> dict[str, Any]:
        return (self.get(kind, name) or {}).get("status", {})

    def condition(self, kind: str, name: str, wanted: str) -> dict[str, str]:
        found = self.status(kind, name).get("conditions", [])
        return next((each for each in found if each["type"] == wanted), {"status": "absent", "reason": ""})

    def redis_secret(self, endpoint: str) -> dict[str, str] | None:
        """The newest Secret with the endpoint's Redis user, decoded, and its name."""
        wanted = ("-l", f"coserve.dev/endpoint={endpoint}", "--sort-by=.metadata.creationTimestamp", "-o", "json")
        found = json.loads(self.kubectl("get", "secrets", *wanted))["items"]
        if not found:
            return None
        data = {key: b64decode(value).decode() for key, value in found[-1]["data"].items()}
        return data | {"name": found[-1]["metadata"]["name"]}

    def events(self, name: str) -> list[str]:
        found = json.loads(self.kubectl("get", "events", "-o", "json"))["items"]
        return [each["reason"] for each in found if each["involvedObject"]["name"] == name]


async def eventually(check: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until `check` is true or gives something; the last answer is shown when it never does.

    It may ask kubectl, and agents beat on meanwhile.
    """
    deadline, answer = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        answer = await asyncio.to_thread(check)
        answer = await answer if asyncio.iscoroutine(answer) else answer
        if answer:
            return answer
        await asyncio.sleep(0.2)
    raise AssertionError(f"not within {seconds} s; the last answer was {answer!r}")


class Agent:
    """An agent that sends heartbeats, and does fenced writes when told to."""

    def __init__(self, redis: Redis, uid: str, pod: str, boot: str = "b1") -> None:
        self.id, self.pod, self.boot = agent_id(f"uid-{pod}", boot), pod, boot
        self.keys, self.store = Keys(uid), Store(redis, Keys(uid))
        self.fencing = Fencing(redis, self.keys, self.id)
        self.jobs: dict[str, JobBeat] = {}
        self.adapters: dict[str, int] = {}
        self.follows = True
        """Whether it loads what is published."""
        self.more: dict[str, Any] = {}
        self._ending = False
        self._task = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while not self._ending:
            beat = Heartbeat(
                agent_id=self.id, pod_name=self.pod, pod_uid=f"uid-{self.pod}", boot_id=self.boot, node="node-1",
                ready=True, jobs=self.jobs, adapters=self.adapters, **self.more,
            )  # fmt: skip
            with contextlib.suppress(RedisError):
                incarnation = await self.fencing.heartbeat(beat)
                if incarnation != self.fencing.incarnation:
                    self.fencing.register(incarnation)
                found = await self.store.adapters()
                if self.follows:
                    self.adapters = {name: record.number for name, record in found.items()}
            await asyncio.sleep(0.3)

    async def binding(self, job: str) -> Binding | None:
        return (await self.store.bindings(self.id))[0].get(job)

    async def run(self, job: str, epoch: int, step: int = 1) -> None:
        await eventually(lambda: self.fencing.incarnation)  # a heartbeat tells it, and may come after the binding
        await eventually(lambda: self.binding(job))  # which comes after the status that tests look at
        lease = await self.fencing.take_lease(job, epoch)
        assert isinstance(lease, Lease), lease
        self.jobs[job] = JobBeat(epoch=epoch, step=step)

    async def stop(self) -> None:
        self._ending = True
        await self._task


class Operator:
    """The process under test."""

    def __init__(self, folder: Path, cluster: Cluster, redis_server: Any) -> None:
        self.folder, self.count, self.cluster = folder, 0, cluster
        self.env = os.environ | {
            "KUBECONFIG": str(cluster.api.kubeconfig),
            "COSERVE_REDIS_URL": redis_server.url,
            "COSERVE_REDIS_PASSWORD": redis_server.password,
            "COSERVE_ENDPOINT_KEY": "a key",
            "COSERVE_AGENT_IMAGE": "agent:test",
            "COSERVE_NAMESPACE": cluster.namespace,
            "COSERVE_HEALTH_PORT": "0",
            "COSERVE_POLL_SECONDS": "0.3",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        self.count += 1
        if self.count == 1:  # as the chart makes it; one that is missing may have been deleted under a leader
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "coserve-operator"}}
            self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(lease))
        log = (self.folder / f"operator-{self.count}.log").open("wb")
        words = [sys.executable, "-m", "coserve_operator.main", f"--identity=operator-{self.count}"]
        process = subprocess.Popen(words, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        self.processes.append(process)
        return process

    def log(self, number: int) -> str:
        return (self.folder / f"operator-{number}.log").read_text()

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
                process.wait(20)


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

    return str(await eventually(binding))
