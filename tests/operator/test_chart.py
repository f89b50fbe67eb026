"""The chart lints, a real API server takes what it renders, its CRDs are the repository's, wrong values are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "coserve"
KUBERNETES = "1.34.0"
SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "development": yaml.safe_load((ROOT / "hack" / "manifests" / "values.yaml").read_text()),
    "external-redis": {
        "redis": {
            "mode": "External",
            "external": {"url": "rediss://redis.example:6380/0", "username": "root", "existingSecret": "redis"},
        },
        "access": {"existingSecret": "keys"},
    },
    "no-metrics-api": {
        "metricsApi": {"mode": "None"},
        "networkPolicies": {"enabled": False},
        "crds": {"install": False},
    },
    "two-operators": {
        "imagePullSecrets": [{"name": "registry"}],
        "operator": {
            "image": "registry.example/coserve/operator:1",
            "agentImage": "registry.example/coserve/agent:1",
            "replicas": 2,
            "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "nodeSelector": {"pool": "system"},
            "tolerations": [{"key": "system", "operator": "Exists"}],
        },
        "redis": {"size": "10Gi", "storageClassName": "fast"},
    },
}


@pytest.fixture(scope="module")
def helm() -> Path:
    """Helm, as the development cluster builds it."""
    folder = subprocess.run([ROOT / "hack" / "cluster", "bin"], capture_output=True, text=True, check=True).stdout
    program = Path(folder.strip()) / "helm"
    if not program.exists():
        pytest.skip(f"{program} is missing: run hack/cluster build")
    return program


@pytest.fixture
def render(helm, tmp_path):
    """Render the chart with values; the answer has returncode, stdout and stderr."""

    def run(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
        words = [helm, "template", "coserve", CHART, "--namespace", "coserve-system", "--kube-version", KUBERNETES]
        return subprocess.run(
            [*words, "--values", tmp_path / "values.yaml"], capture_output=True, text=True, check=False
        )

    return run


def objects(rendered: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    assert rendered.returncode == 0, rendered.stderr
    documents = [each for each in yaml.safe_load_all(rendered.stdout) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def test_the_charts_crds_are_the_repositorys() -> None:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        copy = CHART / "files" / "crds" / path.name
        assert copy.read_bytes() == path.read_bytes(), f"cp {path} {copy}"
    assert {each.name for each in (CHART / "files" / "crds").iterdir()} == {
        each.name for each in (ROOT / "crds").glob("*.yaml")
    }


def test_helm_lint_finds_nothing(helm) -> None:
    done = subprocess.run(
        [helm, "lint", "--strict", CHART, "--kube-version", KUBERNETES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_restricted_and_has_limits(render, name) -> None:
    found = objects(render(SETS[name]))
    workloads = [body for (kind, _), body in found.items() if kind in ("Deployment", "StatefulSet")]
    assert len(workloads) >= 1
    for body in workloads:
        pod = body["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "requests" in container["resources"]
            assert container["livenessProbe"]
            assert container["readinessProbe"]


def test_the_operator_may_not_read_secrets_and_nothing_has_a_star(render) -> None:
    rules = [
        (name, rule)
        for (kind, name), body in objects(render({})).items()
        if kind in ("ClusterRole", "Role")
        for rule in body["rules"]
    ]
    for name, rule in rules:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], name
        if "secrets" in rule["resources"]:
            assert rule["verbs"] == ["create"]


def test_what_matters_stays_when_the_chart_goes(render) -> None:
    found = objects(render({}))
    kept = {key for key, body in found.items() if "helm.sh/resource-policy" in body["metadata"].get("annotations", {})}
    assert {kind for kind, _ in kept} == {"CustomResourceDefinition", "Secret"}
    assert len(kept) == 3


def test_parts_that_are_turned_off_are_absent(render) -> None:
    found = objects(render(SETS["no-metrics-api"]))
    assert not {kind for kind, _ in found} & {"APIService", "NetworkPolicy", "CustomResourceDefinition"}
    assert "coserve-metrics-api" not in {name for _, name in found}
    found = objects(render(SETS["external-redis"]))
    assert ("StatefulSet", "coserve-redis") not in found
    assert ("Secret", "coserve-access") not in found
    operator = found["Deployment", "coserve-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert "--redis-url=rediss://redis.example:6380/0" in operator["args"]
    env = {each["name"]: each for each in operator["env"]}
    assert env["COSERVE_REDIS_USERNAME"]["value"] == "root"
    assert env["COSERVE_REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metricsApi": {"mode": "KEDA"}}, "/metricsApi/mode"),
        ({"redis": {"mode": "External"}}, "/redis/external"),
        ({"operator": {"replica": 2}}, "'replica' not allowed"),
        ({"redis": {"mode": "External", "external": {"url": "redis://me:secret@x:1", "existingSecret": "x"}}}, "url"),
    ],
)
def test_wrong_values_are_refused_by_name(render, values, words) -> None:
    refused = render(values)
    assert refused.returncode != 0
    assert words in refused.stderr


@pytest.mark.apiserver
@pytest.mark.parametrize("name", SETS)
def test_a_real_api_server_takes_all_of_it(api_server, render, name) -> None:
    rendered = render(SETS[name])
    api_server.kubectl("create", "namespace", "coserve-system")
    api_server.kubectl("label", "namespace", "coserve-system", "pod-security.kubernetes.io/warn=restricted")
    done = api_server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=rendered.stdout)
    assert done.returncode == 0, done.stderr
    assert "PodSecurity" not in done.stderr
    assert done.stdout.count("(server dry run)") == len(objects(rendered))


@pytest.mark.apiserver
def test_the_autoscaler_of_kubernetes_may_read_our_metric_and_scale_endpoints(api_server) -> None:
    """The bootstrap policy gives its controller every custom metric and every /scale."""
    role = json.loads(
        api_server.kubectl("get", "clusterrole", "system:controller:horizontal-pod-autoscaler", "-o", "json").stdout
    )
    grants = [
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule.get("apiGroups", [])
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
    ]
    assert {("*", "*/scale", "get"), ("*", "*/scale", "update")} <= set(grants)
    assert ("custom.metrics.k8s.io", "*", "get") in grants
