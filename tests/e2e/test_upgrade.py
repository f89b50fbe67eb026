"""`helm upgrade` from the first version that was released, with its chart, operator and agents, under a job and under
streams. Agents and feeders of both versions have their packages beside the model, in its claim, which each of them
mounts at one place; whose, an image's PYTHONPATH says, so that the chart's default image is what changes, as in
production.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo.cluster import condition
from job_checks import complete, training_log, version_folder
from system import ROOT, Cluster, example, step

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

RELEASED = "386789f"
SYSTEM, RELEASE = "coserve-system", "coserve"
STEPS, UPGRADE_AT = 240, 40
TRAINING = {
    "maxSteps": STEPS, "batchSize": 4, "learningRate": "4e-3", "schedule": "linear", "warmupSteps": 4, "seed": 11,
}  # fmt: skip
PACKAGES = "/models/coserve-demo/packages"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of that version."""
    found = subprocess.run(["git", "-C", ROOT, "cat-file", "-e", f"{RELEASED}^{{commit}}"], check=False)
    if found.returncode != 0:
        pytest.skip(f"commit {RELEASED} is not in this clone: git fetch --unshallow")
    folder = tmp_path_factory.mktemp("released")
    archive = subprocess.run(["git", "-C", ROOT, "archive", RELEASED], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


class Versions:
    """Both versions on one cluster: images, packages, and the chart of the one that is installed."""

    def __init__(self, cluster: Cluster, released: Path) -> None:
        self.cluster = cluster
        self.checkouts = {"old": released, "new": ROOT}

    def prepare(self) -> None:
        self.cluster.script("cluster", "install")
        self.cluster.script("cluster", "up")
        self.cluster.script("cluster", "images", "redis", "agent-dev")
        for name in ("demo", "artifacts"):  # what an earlier run left
            shutil.rmtree(self.cluster.volumes / name, ignore_errors=True)
        images = ["redis"]
        for name, checkout in self.checkouts.items():  # this checkout last: others look for its image by that name
            self.cluster.script("cluster", "images", "operator", checkout=checkout)
            packages = self.cluster.volumes / "demo/packages" / name
            self.cluster.script("cluster", "pod-env", str(packages), checkout=checkout)
            buildah("tag", "localhost/coserve-operator:dev", f"localhost/coserve-operator:{name}")
            container = buildah("from", "localhost/coserve-agent-dev:dev")
            path = f"{PACKAGES}/{name}/coserve:{PACKAGES}/{name}/site-packages"
            buildah("config", "--env", f"PYTHONPATH={path}", container)
            buildah("commit", "-q", "--rm", container, f"localhost/coserve-agent:{name}")
            images += [f"localhost/coserve-{part}:{name}" for part in ("operator", "agent")]
        self.cluster.script("cluster", "load", *images)
        self._make_volumes()

    def _make_volumes(self) -> None:
        volumes = self.cluster.volumes
        subprocess.run(["cp", "-r", ROOT / "examples/base-model", volumes / "demo"], check=True)
        words = [ROOT / ".venv/bin/python", ROOT / "examples/make_dataset.py", "--out", volumes / "demo"]
        subprocess.run(words, check=True)
        (volumes / "artifacts").mkdir()
        subprocess.run(["chown", "65532:65532", volumes / "artifacts"], check=True)
        subprocess.run(["chmod", "-R", "a+rX", volumes / "demo"], check=True)
        manifest = (ROOT / "hack/manifests/volumes.yaml").read_text().replace("@VOLUMES@", str(volumes))
        self.cluster.run("kubectl", "apply", "-f", "-", stdin=manifest)

    def install(self, name: str) -> None:
        checkout = self.checkouts[name]
        images = {"operator.image": "operator", "operator.agentImage": "agent"}
        set_ = [word for key, part in images.items() for word in ("--set", f"{key}=localhost/coserve-{part}:{name}")]
        self.cluster.run(
            *("helm", "upgrade", "--install", RELEASE, str(checkout / "helm/coserve"), "--namespace", SYSTEM),
            *("--create-namespace", "--values", str(checkout / "hack/manifests/values.yaml"), *set_),
            *("--wait", "--timeout", "4m"),
        )


def buildah(*words: str) -> str:
    return subprocess.run(["buildah", *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def versions(released: Path) -> Iterator[Versions]:
    cluster = Cluster(ROOT / ".cache" / "upgrade-cluster")
    cluster.script("cluster", "down")
    try:
        made = Versions(cluster, released)
        made.prepare()
        yield made
    finally:
        cluster.script("cluster", "down")


def endpoint() -> dict[str, Any]:
    """As its author wrote it for that version, and has not touched since."""
    body = example("endpoint.yaml", autoscaling={"minReplicas": 2, "maxReplicas": 3, "targetSaturationPercent": 90})
    body["spec"].pop("image")
    body["spec"].pop("finetuning")
    body["spec"]["template"] = {"resources": body["spec"]["template"]["resources"]}
    return body


def job(name: str) -> dict[str, Any]:
    body = example("job.yaml", training=TRAINING, checkpoint={"everySteps": 10}, adapter={"name": name})
    body["metadata"]["name"] = name
    return body


def ready(image: str) -> Any:
    def done(body: dict[str, Any]) -> bool:
        status, template = body.get("status", {}), body["spec"]["template"]["spec"]
        return (
            template["containers"][0]["image"] == image
            and status.get("observedGeneration") == body["metadata"]["generation"]
            and status.get("updatedReplicas") == status.get("readyReplicas") == status.get("replicas") == 2
        )

    return done


def test_an_upgrade_under_a_job_and_streams_loses_nothing(versions: Versions) -> None:
    cluster = versions.cluster
    versions.install("old")
    cluster.apply(endpoint())
    cluster.run("kubectl", "wait", "--for=create", "deployment/tiny", "--timeout=60s")
    cluster.wait("deployment", "tiny", ready("localhost/coserve-agent:old"), "two agents of the old version", 240)
    cluster.apply(job("undisturbed"))
    undisturbed = cluster.wait("ftj", "undisturbed", complete, "Complete", 900)

    autoscaler = cluster.get("hpa", "tiny")["metadata"]["uid"]
    keys = cluster.get("secret", "coserve-access", SYSTEM)["data"]
    address = cluster.get("service", "tiny")["spec"]["clusterIP"]
    streams = cluster.background("streams.py", f"http://{address}", "tiny", "4")
    try:
        cluster.apply(job("upgraded"))
        before = cluster.wait("ftj", "upgraded", lambda b: step(b) >= UPGRADE_AT, f"step {UPGRADE_AT}", 240)
        versions.install("new")
        new_agents = ready("localhost/coserve-agent:new")
        cluster.wait("deployment", "tiny", new_agents, "two agents of the new version", 400)
        upgraded = cluster.wait("ftj", "upgraded", complete, "Complete", 900)
    finally:
        output, _ = streams.communicate("\n", timeout=120)
    result = json.loads(output)
    print(f"{result['sent']} streams, {result['again']} sent again, {len(result['failed'])} failed")
    assert result["failed"] == []

    assert before["status"]["state"] == "Running"
    assert upgraded["status"]["binding"]["epoch"] > before["status"]["binding"]["epoch"]
    # Each namespace has a Redis of its own since: agents that know only the one before are lost to the operator, once.
    assert upgraded["status"].get("restarts", 0) <= 1
    folders = [version_folder(cluster, body) for body in (undisturbed, upgraded)]
    logs = [training_log(folder) for folder in folders]
    assert [row["step"] for row in logs[1]] == list(range(1, STEPS + 1))
    # Both versions read the same samples in the same order. Whether their engines agree to the bit is no promise.
    assert [row["samples"] for row in logs[1]] == [row["samples"] for row in logs[0]]
    assert [row["loss"] for row in logs[1]] == pytest.approx([row["loss"] for row in logs[0]], rel=1e-3)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    print(f"the adapter's bits are {'those' if weights[0] == weights[1] else 'not those'} of the undisturbed job's")

    assert cluster.get("hpa", "tiny")["metadata"]["uid"] == autoscaler
    assert cluster.get("secret", "coserve-access", SYSTEM)["data"] == keys
    assert condition(cluster.get("iep", "tiny"), "ScalingReady")["status"] == "True"
    for adapter in ("undisturbed", "upgraded"):
        assert "text" in json.loads(cluster.python("ask.py", f"http://{address}", adapter, "Tom has 3 pens."))
