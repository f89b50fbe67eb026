"""FinetuneJobs of the tests: what they are asked for, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.cluster import condition
from system import Cluster, example

TRAINING = {"maxSteps": 120, "batchSize": 4, "learningRate": "4e-3", "schedule": "linear", "warmupSteps": 4, "seed": 11}


def job(name: str, **spec: Any) -> dict[str, Any]:
    body = example("job.yaml", training=TRAINING, checkpoint={"everySteps": 5}, adapter={"name": name}, **spec)
    body["metadata"]["name"] = name
    return body


def ready(replicas: int) -> Any:
    def done(body: dict[str, Any]) -> bool:
        status = body.get("status", {})
        return condition(body, "Ready").get("status") == "True" and status.get("readyReplicas") == replicas

    return done


def complete(body: dict[str, Any]) -> bool:
    failed = condition(body, "Failed")
    assert failed.get("status") != "True", failed
    return condition(body, "Complete").get("status") == "True"


def version_folder(cluster: Cluster, body: dict[str, Any]) -> Path:
    store, path = str(body["status"]["adapter"]["uri"]).split("pvc://coserve-artifacts/")
    assert store == ""
    return cluster.volumes / "artifacts" / path


def training_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def assert_the_same(cluster: Cluster, undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> None:
    """Every step once, on the same samples, and the adapter's bits."""
    folders = [version_folder(cluster, body) for body in (undisturbed, disturbed)]
    logs = [training_log(folder) for folder in folders]
    assert [row["step"] for row in logs[1]] == list(range(1, TRAINING["maxSteps"] + 1))
    assert [row["samples"] for row in logs[1]] == [row["samples"] for row in logs[0]]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
