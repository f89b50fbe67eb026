"""The next version, this one and the next again under a running job: operators and CRDs of each, a real API server with
the controllers of Deployments and Jobs, and their pods as processes.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_programs import running_programs
from api_http import async_client
from live_operator import Cluster, Operator, eventually
from next_version import DEFAULT, THIS, Version, make_next
from played_kubelet import Kubelet
from redis.asyncio import Redis
from small_models import CONTEXT, write_model

from coserve_contract.keys import Keys
from coserve_contract.store import Store

pytestmark = [pytest.mark.apiserver, pytest.mark.nightly]

CHANGE_AT, STEPS_UNDER_EACH = 50, 20
STEPS = 400
"""More than are fed before the last change: five times what is asked for, and what the feeder has room for then."""
CONTROLLERS = ("deployment", "replicaset", "job", "garbage-collector")


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory, servers: Any) -> Iterator[Any]:
    """One of this module's own, with controllers: elsewhere they would make pods that nobody runs."""
    folder = tmp_path_factory.mktemp("apiserver")
    with servers.kubernetes(folder) as api:
        program = str(api.kubectl_program.with_name("kube-controller-manager"))
        named = ",".join(f"{each}-controller" for each in CONTROLLERS)
        flags = ["--kubeconfig", str(api.kubeconfig), "--controllers", named, "--leader-elect=false"]
        with servers.program([program, *flags, "--secure-port=0"], folder / "controllers.log"):
            yield api


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """A model, a data set and an artifact store at the paths at which pods see them."""
    found = {"/models/models": "models", "/data/data": "data", "/artifacts": "artifacts"}
    folders = {path: tmp_path / name for path, name in found.items()}
    for folder in folders.values():
        folder.mkdir()
    (folders["/artifacts"] / "store").mkdir()
    (folders["/models/models"] / "tiny").mkdir()
    write_model(folders["/models/models"] / "tiny")
    rows = [{"prompt": f"one two {n % 7}", "completion": " three four" * (2 + 4 * (n % 9))} for n in range(60)]
    (folders["/data/data"] / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


@pytest.fixture
async def kubelet(cluster: Cluster, volumes: dict[str, Path], tmp_path: Path) -> AsyncIterator[Kubelet]:
    with running_programs(tmp_path) as programs:
        async with async_client(cluster.api) as http:
            made = Kubelet(http, cluster.namespace, programs, volumes)
            running = asyncio.create_task(made.run())
            yield made
            assert not running.done(), running.exception()
            running.cancel()


class Installation:
    """Which version is installed: its CRDs first, then its operator in the place of the one before."""

    def __init__(self, cluster: Cluster, operator: Operator) -> None:
        self.cluster, self.operator = cluster, operator

    async def change(self, version: Version) -> None:
        for file in sorted(version.crds.glob("*.yaml")):
            self.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))
        before = self.operator.processes[-1]
        before.terminate()
        await asyncio.to_thread(before.wait, 20)
        self.operator.env["PYTHONPATH"] = version.python_path
        self.operator.start()
        number = self.operator.count
        await eventually(lambda: f"operator-{number} leads" in self.operator.log(number), 60.0)


@pytest.fixture
def installation(cluster: Cluster, operator: Operator) -> Iterator[Installation]:
    yield Installation(cluster, operator)
    for file in sorted(THIS.crds.glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))


def job(make: Any, name: str) -> dict[str, Any]:
    training = {"maxSteps": STEPS, "batchSize": 4, "learningRate": "5e-3", "seed": 3}
    body = make.job_body(name, training=training, checkpoint={"everySteps": 50}, adapter={"name": name})
    return dict(body)


def fields(status: Any, path: str = "") -> set[str]:
    """The names of all that a status tells, but for what lists hold."""
    if not isinstance(status, dict):
        return {path}
    return {path}.union(*(fields(value, f"{path}.{name}") for name, value in status.items()))


async def complete(cluster: Cluster, name: str) -> dict[str, Any]:
    def done() -> Any:
        assert cluster.condition("ftj", name, "Failed")["status"] != "True", cluster.status("ftj", name)
        return cluster.condition("ftj", name, "Complete")["status"] == "True"

    await eventually(done, 600.0)
    return cluster.status("ftj", name)


class Feeding:
    """A job's feeder, stopped but for when steps are wanted: however fast the machine is, the job outlives the test's
    changes.
    """

    def __init__(self, kubelet: Kubelet, cluster: Cluster, redis: Redis, name: str) -> None:
        self.kubelet, self.cluster, self.name, self.fed = kubelet, cluster, name, 0
        self.uid = str(cluster.get("ftj", name)["metadata"]["uid"])
        self.store = Store(redis, Keys(cluster.get("iep", "tiny")["metadata"]["uid"]))

    def send(self, number: signal.Signals) -> None:
        for pod, program in self.kubelet.by_pod.items():
            if pod.startswith(f"{self.name}-feeder-"):
                program.process.send_signal(number)

    async def _last(self) -> int:
        return (await self.store.job(self.uid)).last_shard

    async def feed(self, steps: int) -> None:
        """So many more, and what there is room for."""
        self.send(signal.SIGCONT)
        async with asyncio.timeout(180.0):
            while await self._last() < self.fed + steps:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self.send(signal.SIGSTOP)
        self.fed = await self._last()

    async def done(self) -> dict[str, Any]:
        """The job's status when it tells of all the steps that were fed."""

        def status() -> Any:
            found = self.cluster.status("ftj", self.name)
            assert found.get("state") in (None, "Pending", "Running"), f"STEPS is too small: {found}"
            return found.get("progress", {}).get("step", 0) >= self.fed and found

        return dict(await eventually(status, 180.0))


async def test_the_next_version_and_back_and_again_under_a_running_job(
    installation: Installation, kubelet: Kubelet, cluster: Cluster, redis: Redis, make: Any, tmp_path: Path
) -> None:
    coming = make_next(tmp_path / "next")
    await installation.change(coming)
    small = {"kvCacheMemory": "16Mi", "threads": 1}
    model = {"uri": "pvc://models/tiny", "maxModelLength": CONTEXT}
    cluster.apply(make.endpoint_body(), replicas=1, engine=small, model=model)
    await eventually(lambda: cluster.condition("iep", "tiny", "Ready")["status"] == "True", 180.0)
    cluster.apply(job(make, "undisturbed"))
    undisturbed = await complete(cluster, "undisturbed")

    cluster.apply(job(make, "changed"))
    feeding = Feeding(kubelet, cluster, redis, "changed")
    await feeding.feed(CHANGE_AT)
    before = await feeding.done()
    kinds = (("iep", "tiny"), ("ftj", "changed"))
    known = {kind: fields(cluster.status(kind, name)) for kind, name in kinds}
    pods = {pod["metadata"]["uid"] for pod in await kubelet.pods()}
    for version in (THIS, coming):
        await feeding.feed(STEPS_UNDER_EACH)  # of which some are done while no operator leads
        await installation.change(version)
        await feeding.feed(STEPS_UNDER_EACH)
        after = await feeding.done()
        for kind, name in kinds:
            assert known[kind] - fields(cluster.status(kind, name)) == set()
            assert cluster.status(kind, name)["seenLater"] == DEFAULT
            assert cluster.get(kind, name)["spec"].get("later") == (None if version is THIS else DEFAULT)
        assert {pod["metadata"]["uid"] for pod in await kubelet.pods()} == pods
        assert after["binding"] == before["binding"]

    feeding.send(signal.SIGCONT)
    changed = await complete(cluster, "changed")
    assert (changed["binding"]["epoch"], changed.get("restarts", 0)) == (1, 0)
    folders = [kubelet.volumes["/artifacts"] / status["adapter"]["uri"].removeprefix("pvc://artifacts/")
               for status in (undisturbed, changed)]  # fmt: skip
    logs = [(folder / "training_log.jsonl").read_text().splitlines() for folder in folders]
    assert [json.loads(line)["step"] for line in logs[1]] == list(range(1, STEPS + 1))
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
