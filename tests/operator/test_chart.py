"""The chart lints, a real API server takes what it renders, the same each time; its CRDs are the repository's, the
table of values is true, wrong values are refused.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from coserve_operator.settings import MetricsApiSettings, PodDefaults, Settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "coserve"
KUBERNETES = "1.34.0"
POD = {"podLabels": {"team": "ml", "app.kubernetes.io/name": "other"}, "podAnnotations": {"example.com/a": "b"}}
PLACEMENT = {
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "development": yaml.safe_load((ROOT / "hack" / "manifests" / "values.yaml").read_text()),
    "external-redis": {
        "redis": {
            "mode": "External",
            "external": {
                "url": "rediss://redis.example:6380/0",
                "username": "root",
                "existingSecret": "redis",
                "caSecret": "redis-ca",
            },
        },
        "operator": {"agentRedisUrl": "redis://redis.example:6379/0"},
        "access": {"existingSecret": "keys"},
    },
    "shared-redis-user": {
        "redis": {
            "mode": "External",
            "external": {"url": "redis://r:1/0", "username": "me", "existingSecret": "r", "endpointUsers": "Shared"},
        },
    },
    "redis-tls": {"redis": {"tls": {"existingSecret": "from-cert-manager"}}},
    "publishers": {"admission": {"publishers": True}},
    "no-metrics-api": {
        "metricsApi": {"mode": "None"},
        "networkPolicies": {"enabled": False},
        "crds": {"install": False},
    },
    "given-secrets": {
        "access": {"existingSecret": "keys"},
        "metricsApi": {"certificate": {"existingSecret": "from-cert-manager"}},
    },
    "everything": {
        "imagePullSecrets": [{"name": "registry"}],
        "commonLabels": {"team": "ml", "app.kubernetes.io/part-of": "platform"},
        "crds": {"keep": False},
        "agents": {
            "labels": {"team": "ml"},
            "annotations": {"sidecar.istio.io/inject": "false"},
            "priorityClassName": "gpu",
            "runtimeClassName": "nvidia",
            **PLACEMENT,
        },
        "metricsApi": {"priorityClassName": "system-cluster-critical", **POD, **PLACEMENT},
        "redis": {"priorityClassName": "system-cluster-critical", **POD, **PLACEMENT},
        "operator": {
            "priorityClassName": "system-cluster-critical",
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
            "serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"},
            "workers": 16,
            "pollSeconds": 0.5,
            "fullPollSeconds": 20,
            **POD,
            **PLACEMENT,
        },
    },
    "two-operators": {
        "operator": {
            "image": "registry.example/coserve/operator:1",
            "agentImage": "registry.example/coserve/agent:1",
            "replicas": 2,
            "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "nodeSelector": {"pool": "system"},
            "tolerations": [{"key": "system", "operator": "Exists"}],
        },
        "redis": {"resources": {"limits": {"memory": "2Gi"}}},
    },
}


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
        assert {each["topologyKey"] for each in pod["topologySpreadConstraints"]}
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "requests" in container["resources"]
            assert container["livenessProbe"]
            assert container["readinessProbe"]


def test_the_operator_reads_no_secret_but_its_own_and_nothing_has_a_star(render) -> None:
    rules = [
        (kind, rule)
        for (kind, name), body in objects(render({})).items()
        if kind in ("ClusterRole", "Role")
        for rule in body["rules"]
    ]
    for kind, rule in rules:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], rule
        if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:
            assert kind == "Role"
            assert set(rule["resourceNames"]) <= {"coserve-access", "coserve-metrics-api-certificate"}
        if "apiservices" in rule["resources"]:
            assert all(each.endswith(".custom.metrics.k8s.io") for each in rule["resourceNames"])


def test_of_custom_resources_the_operator_deletes_jobs_alone(render) -> None:
    """Those whose ttlSecondsAfterFinished is over."""
    rules = objects(render({}))["ClusterRole", "coserve-operator"]["rules"]
    ours = [rule for rule in rules if rule["apiGroups"] == ["coserve.dev"] and "delete" in rule["verbs"]]
    assert [rule["resources"] for rule in ours] == [["finetunejobs"]]


def test_what_matters_stays_when_the_chart_goes(render) -> None:
    found = objects(render({}))
    kept = {key for key, body in found.items() if "helm.sh/resource-policy" in body["metadata"].get("annotations", {})}
    assert {kind for kind, _ in kept} == {"CustomResourceDefinition"}
    assert len(kept) == 2


@pytest.mark.parametrize("name", SETS)
def test_it_renders_the_same_whatever_there_is_in_the_cluster(render, name) -> None:
    first = render(SETS[name])
    assert objects(first)
    assert render(SETS[name], "--is-upgrade").stdout == first.stdout
    kinds = {kind for kind, _ in objects(first)}
    assert not kinds & {"APIService", "Lease", "Secret"}, "Argo CD leaves the first two out, the operator makes all"


def test_templates_ask_nothing_of_the_cluster_and_draw_nothing() -> None:
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            drawn = re.findall(
                r"\b(lookup|rand\w+|gen[A-Z]\w+|now|uuidv4|\.Release\.(?:IsUpgrade|Revision))\b", path.read_text()
            )
            assert not drawn, path.name


def test_every_knob_of_the_platform_reaches_pods(render) -> None:
    found = objects(render(SETS["everything"]))
    for kind, name in (
        ("Deployment", "coserve-operator"),
        ("Deployment", "coserve-metrics-api"),
    ):
        template = found[kind, name]["spec"]["template"]
        pod, labels = template["spec"], template["metadata"]["labels"]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["priorityClassName"] == "system-cluster-critical"
        (spread,) = PLACEMENT["topologySpreadConstraints"]
        selector = {"matchLabels": {"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "coserve"}}
        expected = PLACEMENT | {"topologySpreadConstraints": [spread | {"labelSelector": selector}]}
        assert {key: pod[key] for key in PLACEMENT} == expected
        assert labels["team"] == "ml"
        assert labels["app.kubernetes.io/name"] == name, "what is selected by stays"
        assert template["metadata"]["annotations"] == {"example.com/a": "b"}
    assert all(body["metadata"]["labels"]["team"] == "ml" for body in found.values())
    operator = found["Deployment", "coserve-operator"]["spec"]["template"]["spec"]["containers"][0]
    settings = Settings(_cli_parse_args=operator["args"])
    assert settings.pod_defaults == PodDefaults.model_validate(
        {"imagePullSecrets": [{"name": "registry"}], **SETS["everything"]["agents"]}
    )
    assert (settings.workers, settings.poll_seconds, settings.full_poll_seconds) == (16, 0.5, 20)
    assert settings.redis_url == "redis://{redis}.coserve-system.svc:6379/0"
    redis = settings.tenant_redis
    assert redis is not None
    assert redis.pod == PodDefaults.model_validate(
        {
            "imagePullSecrets": [{"name": "registry"}],
            "priorityClassName": "system-cluster-critical",
            "labels": POD["podLabels"],
            "annotations": POD["podAnnotations"],
            **PLACEMENT,
        }
    )
    assert (redis.labels["team"], redis.network_policy) == ("ml", True)
    assert {"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"} in operator["env"]


def test_the_programs_take_what_the_chart_gives_them(render) -> None:
    found = objects(render({}))
    for name, settings in (("coserve-operator", Settings), ("coserve-metrics-api", MetricsApiSettings)):
        container = found["Deployment", name]["spec"]["template"]["spec"]["containers"][0]
        settings(_cli_parse_args=container["args"])


def test_a_version_with_build_metadata_gives_valid_labels(helm, render, tmp_path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    about = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(about.replace("0.1.0", "0.1.0+build.5"))
    for body in objects(render({}, chart=chart)).values():
        for value in body["metadata"]["labels"].values():
            assert re.fullmatch("[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", value), value
        for container in body["spec"]["template"]["spec"]["containers"] if "template" in body.get("spec", {}) else ():
            assert "+" not in container["image"]


def test_the_table_of_values_is_that_of_the_values() -> None:
    path = ROOT / "hack" / "chart-values"
    loader = importlib.machinery.SourceFileLoader("chart_values", str(path))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("chart_values", loader))
    loader.exec_module(script)
    page, values = (CHART / "README.md").read_text(), (CHART / "values.yaml").read_text()
    assert page == script.filled(page, values), "run hack/chart-values"


def test_the_schema_knows_exactly_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    free = {"resources", "imagePullSecrets"}

    def compare(values: dict[str, Any], part: dict[str, Any], path: str) -> None:
        properties = part["properties"]
        assert values.keys() == properties.keys() - {"global"}, path
        for key, value in values.items():
            if isinstance(value, dict) and key not in free and "$ref" not in properties[key]:
                compare(value, properties[key], f"{path}.{key}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


def test_parts_that_are_turned_off_are_absent(render) -> None:
    found = objects(render(SETS["no-metrics-api"]))
    assert not {kind for kind, _ in found} & {"APIService", "NetworkPolicy", "CustomResourceDefinition"}
    assert "coserve-metrics-api" not in {name for _, name in found}
    found = objects(render(SETS["external-redis"]))
    operator = found["Deployment", "coserve-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert "--redis-url=rediss://redis.example:6380/0" in operator["args"]
    env = {each["name"]: each for each in operator["env"]}
    assert env["COSERVE_REDIS_USERNAME"]["value"] == "root"
    assert env["COSERVE_REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}
    settings = Settings(_cli_parse_args=operator["args"])
    assert (settings.tenant_redis, settings.shared_user) == (None, False)
    assert settings.redis_url_of_agents == "redis://redis.example:6379/0"


def volumes(workload: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("secret") for each in workload["spec"]["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("name", "secret", "files"),
    [("external-redis", "redis-ca", ["ca.crt"]), ("redis-tls", "from-cert-manager", ["ca.crt", "tls.crt"])],
)
def test_the_ca_of_redis_reaches_those_who_connect(render, name, secret, files) -> None:
    found = objects(render(SETS[name]))
    for deployment, wanted in (("coserve-operator", files), ("coserve-metrics-api", ["ca.crt"])):
        workload = found["Deployment", deployment]
        mounted = volumes(workload)["redis-tls"]
        assert mounted["secretName"] == secret
        assert [each["key"] for each in mounted["items"]] == wanted
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert "--redis-tls=/redis-tls" in container["args"]
        assert {"name": "redis-tls", "mountPath": "/redis-tls", "readOnly": True} in container["volumeMounts"]
    assert "redis-tls" not in volumes(objects(render({}))["Deployment", "coserve-operator"])


def test_with_a_certificate_everybody_uses_tls(render) -> None:
    operator = objects(render(SETS["redis-tls"]))["Deployment", "coserve-operator"]
    settings = Settings(_cli_parse_args=operator["spec"]["template"]["spec"]["containers"][0]["args"])
    assert settings.redis_url == "rediss://{redis}.coserve-system.svc:6379/0"
    assert settings.tenant_redis is not None
    assert settings.tenant_redis.tls_secret == "from-cert-manager"


def test_without_users_of_their_own_all_have_the_given_one(render) -> None:
    found = objects(render(SETS["shared-redis-user"]))
    operator, metrics = (
        found["Deployment", name]["spec"]["template"]["spec"]["containers"][0]
        for name in ("coserve-operator", "coserve-metrics-api")
    )
    assert Settings(_cli_parse_args=operator["args"]).shared_user
    env = {each["name"]: each for each in metrics["env"]}
    assert env["COSERVE_REDIS_USERNAME"]["value"] == "me"
    assert env["COSERVE_REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "r", "key": "password"}


def test_redis_is_run_by_the_operator_which_deletes_what_it_made_in_its_own_namespace_alone(render) -> None:
    found = objects(render({}))
    assert not [name for _, name in found if "redis" in name]
    kinds = {
        kind
        for (kind, name), body in found.items()
        if name == "coserve-operator" and kind in ("Role", "ClusterRole")
        for rule in body["rules"]
        if "deployments" in rule["resources"] and "delete" in rule["verbs"]
    }
    assert kinds == {"Role"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metricsApi": {"mode": "KEDA"}}, "/metricsApi/mode"),
        ({"agents": {"image": "x"}}, "'image' not allowed"),
        ({"operator": {"workers": 0}}, "/operator/workers"),
        ({"operator": {"affinity": {"nodeAfinity": {}}}}, "'nodeAfinity' not allowed"),
        ({"redis": {"mode": "External"}}, "/redis/external"),
        ({"operator": {"replica": 2}}, "'replica' not allowed"),
        ({"redis": {"ephemeral": True}}, "'ephemeral' not allowed"),
        ({"redis": {"resources": {"limits": {"memory": None}}}}, "memory"),
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
    api_server.kubectl("-n", "coserve-system", "create", "serviceaccount", "default")
    api_server.kubectl("label", "namespace", "coserve-system", "pod-security.kubernetes.io/warn=restricted")
    done = api_server.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-", stdin=rendered.stdout
    )
    assert done.returncode == 0, done.stderr
    assert "PodSecurity" not in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("(server dry run)") == len([each for each in yaml.safe_load_all(rendered.stdout) if each])


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
