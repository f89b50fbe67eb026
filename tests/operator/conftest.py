"""Endpoints, jobs and messages with the least in them, for every test of the operator; and the operator as a process,
on a real API server and a real Redis.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from job_situation import Situation
from live_operator import Agent, Cluster, Operator, eventually
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_contract.keys import Keys
from coserve_contract.messages import (
    AdapterFiles,
    Checkpoint,
    Completed,
    FeedStatus,
    Heartbeat,
    JobBeat,
    Load,
    Progress,
    SloReport,
)
from coserve_contract.store import Store

ROOT = Path(__file__).parents[2]
CHART, KUBERNETES = ROOT / "helm" / "coserve", "1.34.0"
NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
SHA = "0123456789abcdef" * 4
NAMESPACE = "ml"


def endpoint_body(name: str = "tiny", uid: str = "e-1", *, status: Any = None, **spec: Any) -> dict[str, Any]:
    """An endpoint as kubectl would apply it; `spec` is merged over the least one."""
    body = {
        "apiVersion": "coserve.dev/v1alpha1",
        "kind": "InferenceEndpoint",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": uid, "generation": 1, "resourceVersion": "1",
            "creationTimestamp": "2026-11-21T11:00:00Z",
        },
        "spec": {"model": {"uri": "pvc://models/tiny"}, "artifactStore": {"uri": "pvc://artifacts/store"}} | spec,
    }  # fmt: skip
    body["spec"]["finetuning"] = {"datasetClaims": ["d", "data", "more"]} | spec.get("finetuning", {})
    if status is not None:
        body["status"] = status
    return body


def job_body(name: str = "job-1", *, number: int = 1, status: Any = None, **spec: Any) -> dict[str, Any]:
    """A job as kubectl would apply it; `number` gives its uid and its place in the queue."""
    body = {
        "apiVersion": "coserve.dev/v1alpha1",
        "kind": "FinetuneJob",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": f"j-{number}", "generation": 1, "resourceVersion": "1",
            "creationTimestamp": f"2026-11-21T11:{number:02d}:00Z",
        },
        "spec": {
            "endpointRef": {"name": "tiny"},
            "dataset": {"uri": "pvc://data/train.jsonl"},
            "adapter": {"name": f"adapter-{number}"},
            "training": {"epochs": 1},
        } | spec,
    }  # fmt: skip
    if status is not None:
        body["status"] = status
    return body


def heartbeat(pod: str, *, boot: str = "b1", ready: bool = True, saturation: float = 0.0, **more: Any) -> Heartbeat:
    """A heartbeat of the agent in `pod`; its jobs are given as {uid: (epoch, step)}."""
    jobs = {uid: JobBeat(epoch=epoch, step=step) for uid, (epoch, step) in more.pop("jobs", {}).items()}
    return Heartbeat(
        agent_id=agent_of(pod, boot), pod_name=pod, pod_uid=f"uid-{pod}", boot_id=boot, node="node-1", ready=ready,
        load=Load(saturation_percent=saturation), jobs=jobs, **more,
    )  # fmt: skip


def agent_of(pod: str, boot: str = "b1") -> str:
    return f"uid-{pod}.{boot}"


def checkpoint(step: int, epoch: int = 1, job: str = "j-1") -> Checkpoint:
    return Checkpoint(step=step, cursor=step, epoch=epoch, path=f"jobs/{job}/e{epoch}/s{step}", sha256=SHA)


def completed(name: str, epoch: int, step: int = 10, number: int = 1) -> Completed:
    files = AdapterFiles(name=name, number=number, path=f"adapters/e-1/{name}/v{number}", sha256=SHA)
    return Completed(epoch=epoch, step=step, tokens=100, adapter=files, loss=0.5, eval_loss=0.6)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers of objects and messages."""
    return SimpleNamespace(
        NOW=NOW,
        NAMESPACE=NAMESPACE,
        endpoint_body=endpoint_body,
        job_body=job_body,
        endpoint=lambda *arguments, **more: InferenceEndpoint.from_dict(endpoint_body(*arguments, **more)),
        job=lambda *arguments, **more: FinetuneJob.from_dict(job_body(*arguments, **more)),
        heartbeat=heartbeat,
        agent_of=agent_of,
        checkpoint=checkpoint,
        completed=completed,
        feed=lambda steps=10, **more: FeedStatus(total_steps=steps, samples=80, eval_samples=4, **more),
        progress=lambda epoch, step, total=10, **more: Progress(
            epoch=epoch, step=step, cursor=step, total_steps=total, **more
        ),
        slo=SloReport,
    )


@pytest.fixture
def it(make: Any) -> Situation:
    """A job that waits on an endpoint without agents."""
    return Situation(make)


# ---- the operator as a process ----


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
def operator_env() -> dict[str, str]:
    """What its settings have beside the usual; a module may say otherwise."""
    return {}


@pytest.fixture
def operator(
    tmp_path: Path, cluster: Cluster, redis: Redis, redis_server: Any, operator_env: dict[str, str]
) -> Iterator[Operator]:
    made = Operator(tmp_path, cluster, redis_server)
    made.env |= operator_env
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
    secret = await eventually(lambda: cluster.redis_secret("tiny"))
    assert secret is not None
    uid = (cluster.get("iep", "tiny") or {})["metadata"]["uid"]
    client = redis_server.connect(secret["username"], secret["password"])
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


# ---- the chart ----


@pytest.fixture(scope="session")
def helm() -> Path:
    """Helm, as the development cluster builds it."""
    folder = subprocess.run([ROOT / "hack" / "cluster", "bin"], capture_output=True, text=True, check=True).stdout
    program = Path(folder.strip()) / "helm"
    if not program.exists():
        pytest.skip(f"{program} is missing: run hack/cluster build")
    return program


@pytest.fixture
def render(helm: Path, tmp_path: Path) -> Any:
    """Render the chart with values; the answer has returncode, stdout and stderr."""

    def run(values: dict[str, Any], *flags: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
        words = [helm, "template", "coserve", chart, "--namespace", "coserve-system", "--kube-version", KUBERNETES]
        return subprocess.run(
            [*words, "--values", tmp_path / "values.yaml", *flags], capture_output=True, text=True, check=False
        )

    return run
