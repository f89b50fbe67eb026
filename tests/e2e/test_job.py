"""A job from apply to a served adapter, with its agent killed in the middle; what users type wrong; and
nothing left behind.
"""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest
from demo.cluster import condition
from job_checks import assert_the_same, complete, job, ready, version_folder
from system import AGENT, Cluster, example, step

pytestmark = pytest.mark.e2e

QUESTION = "Tom has 3 boxes with 4 pens in each. How many pens does he have?"


@pytest.fixture(scope="module")
def endpoint(cluster: Cluster) -> dict[str, Any]:
    cluster.apply(example("endpoint.yaml"))
    return cluster.wait("iep", "tiny", ready(2), "two ready agents", 240)


def base_url(cluster: Cluster) -> str:
    return f"http://{cluster.get('service', 'tiny')['spec']['clusterIP']}"


def test_a_killed_agent_costs_no_step_and_not_one_bit(cluster: Cluster, endpoint: dict[str, Any]) -> None:
    cluster.apply(job("undisturbed"))
    undisturbed = cluster.wait("ftj", "undisturbed", complete, "Complete", 240)

    cluster.apply(job("killed"))
    bound = cluster.wait("ftj", "killed", lambda body: step(body) >= 12, "step 12", 120)
    first = bound["status"]["binding"]
    [pod] = [p for p in cluster.items("pods") if p["metadata"]["name"] == first["agent"]]
    cluster.signal(pod["metadata"]["uid"], AGENT, signal.SIGKILL)
    killed = cluster.wait("ftj", "killed", complete, "Complete", 240)

    assert killed["status"]["binding"]["epoch"] > first["epoch"]
    assert killed["status"]["restarts"] == 1
    assert_the_same(cluster, undisturbed, killed)


def test_the_adapter_answers_by_name_on_every_agent(cluster: Cluster, endpoint: dict[str, Any]) -> None:
    answers = {cluster.python("ask.py", base_url(cluster), "undisturbed", QUESTION) for _ in range(6)}
    assert len(answers) == 1
    base = cluster.python("ask.py", base_url(cluster), "tiny", QUESTION)
    assert json.loads(base)["text"] != json.loads(answers.pop())["text"]
    unknown = json.loads(cluster.python("ask.py", base_url(cluster), "nobody", QUESTION))
    assert unknown["status"] == 404
    assert "nobody" in unknown["body"]["message"]


def test_suspend_gives_the_job_back_and_resume_goes_on(cluster: Cluster, endpoint: dict[str, Any]) -> None:
    cluster.apply(job("paused"))
    cluster.wait("ftj", "paused", lambda body: step(body) >= 7, "step 7", 120)
    cluster.run("kubectl", "patch", "ftj", "paused", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    paused = cluster.wait("ftj", "paused", lambda b: b["status"]["state"] == "Suspended", "Suspended", 60)
    at = step(paused)
    time.sleep(3)
    assert step(cluster.get("ftj", "paused")) == at
    cluster.run("kubectl", "patch", "ftj", "paused", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    done = cluster.wait("ftj", "paused", complete, "Complete", 240)
    weights = [
        version_folder(cluster, b) / "adapter_model.safetensors" for b in (cluster.get("ftj", "undisturbed"), done)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "spec", "kind", "reason", "words"),
    [
        ("no-endpoint", {"endpointRef": {"name": "nobody"}}, "Bound", "EndpointNotFound", ["nobody"]),
        ("rank-too-large", {}, "Bound", "RankTooLarge", ["128", "64"]),
        (
            "no-dataset",
            {"dataset": {"uri": "pvc://coserve-demo/none.jsonl"}},
            "Failed",
            "DatasetNotFound",
            ["none.jsonl"],
        ),
        ("bad-line", {"dataset": {"uri": "pvc://coserve-demo/bad.jsonl"}}, "Failed", "InvalidDataset", ["line 2"]),
    ],
)
def test_a_users_mistake_becomes_a_condition_that_names_it(
    cluster: Cluster,
    endpoint: dict[str, Any],
    name: str,
    spec: dict[str, Any],
    kind: str,
    reason: str,
    words: list[str],
) -> None:
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (cluster.volumes / "demo" / "bad.jsonl").write_text(good + '{"messages": 3}\n' + good)
    body = job(name, **spec)
    if name == "rank-too-large":
        body["spec"]["adapter"]["rank"] = 128
    cluster.apply(body)
    found = condition(cluster.wait("ftj", name, lambda b: condition(b, kind).get("reason") == reason, reason, 90), kind)
    for word in words:
        assert word in found["message"]


def test_a_broken_model_folder_is_named_by_the_endpoint(cluster: Cluster) -> None:
    body = example("endpoint.yaml", model={"uri": "pvc://coserve-demo/no-model"}, replicas=1)
    body["metadata"]["name"] = "broken"
    cluster.apply(body)
    found = cluster.wait(
        "iep", "broken", lambda b: "no-model" in condition(b, "Ready").get("message", ""), "the reason", 120
    )
    assert condition(found, "Ready")["status"] == "False"
    cluster.run("kubectl", "delete", "iep", "broken", "--wait")
