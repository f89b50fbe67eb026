"""What a real API server makes of the CRDs: which objects it refuses and how it says so, defaults, /scale, columns."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from coserve_api.common import timestamp
from coserve_api.conditions import condition
from coserve_api.endpoint import EndpointSpec, InferenceEndpoint
from coserve_api.endpoint_status import EndpointStatus, SloStatus
from coserve_api.job import FROZEN, JobSpec
from coserve_api.job_status import (
    BackoffStatus,
    BindingStatus,
    CheckpointStatus,
    ContinuedFrom,
    EvaluationStatus,
    JobState,
    JobStatus,
    Progress,
    PublishedAdapter,
)
from coserve_api.quantities import quantity_bytes

pytestmark = pytest.mark.apiserver
ROOT = Path(__file__).parents[2]
EXAMPLES = {name: yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text()) for name in ("endpoint", "job")}


@pytest.fixture(scope="module")
def api(api_server):
    """The API server with the CRDs of the repository."""
    for name in ("inferenceendpoints", "finetunejobs"):
        applied = api_server.kubectl("apply", "--server-side", "-f", str(ROOT / "crds" / f"{name}.yaml"))
        assert applied.returncode == 0, applied.stderr
        crd = f"crd/{name}.coserve.dev"
        established = api_server.kubectl("wait", "--for=condition=Established", crd, "--timeout=30s")
        assert established.returncode == 0, established.stderr
    deadline = time.monotonic() + 30
    while api_server.kubectl("get", "coserve").returncode:  # discovery follows a moment later
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return api_server


@pytest.fixture
def objects(api):
    """The two examples, created anew."""
    kinds = "inferenceendpoints,finetunejobs"
    api.kubectl("delete", kinds, "--all", "--wait=true")
    for body in EXAMPLES.values():
        done = api.kubectl("apply", "-f", "-", stdin=json.dumps(body))
        assert done.returncode == 0, done.stderr
    return api


def get(api, what: str, *more: str) -> dict[str, Any]:
    done = api.kubectl("get", what, "-o", "json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def patch(api, what: str, body: dict[str, Any], *more: str) -> str:
    """Merge-patch an object; what kubectl said if it was refused."""
    return api.kubectl("patch", what, "--type=merge", "-p", json.dumps(body), *more).stderr


def with_value(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `body` with one field set, or removed where the value is None."""
    body = copy.deepcopy(body)
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place.setdefault(name, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return body


CHECKPOINT = "pvc://artifacts/store/jobs/f3b1-9/e2/s40"
ADAPTERS = "spec.adapters"
ENV = "spec.template.env"
MOUNTS = "spec.template.volumeMounts"
LIMITS = "spec.template.resources.limits"
KV_CACHE, ACTIVATIONS = "spec.engine.kvCacheMemory", "spec.finetuning.activationMemory"
VOLUMES = "spec.template.volumes"
FAULTS = [
    # which, field to set, value, field in the answer, remedy in the answer
    ("endpoint", "metadata.name", "1tiny", "metadata.name", "begin with a letter"),
    ("endpoint", "metadata.name", "t" * 53, "metadata.name", "52"),
    ("endpoint", "spec.model.uri", None, "spec.model.uri", "Required value"),
    ("endpoint", "spec.model.uri", "pvc://claim/../etc", "spec.model.uri", "no '..'"),
    ("endpoint", "spec.model.uri", "file:///etc/passwd", "spec.model.uri", "file:///models/PATH"),
    ("endpoint", "spec.model.uri", "https://host/model", "spec.model.uri", "must be pvc://CLAIM/PATH"),
    (
        "endpoint",
        "spec.model.uri",
        "pvc://claim/" + "a" * 1024,
        "spec.model.uri",
        "Too long: may not be more than 1024",
    ),
    ("endpoint", "spec.artifactStore.uri", "pvc://Claim/", "spec.artifactStore.uri", "must be pvc://CLAIM/PATH"),
    ("endpoint", "spec.slo.timeToFirstToken", "1 s", "spec.slo.timeToFirstToken", "such as 200ms, 1s or 1m30s"),
    ("endpoint", "spec.slo.timePerOutputToken", "0s", "spec.slo.timePerOutputToken", "from 1ms to 1h"),
    ("endpoint", "spec.slo.timePerOutputToken", "61m", "spec.slo.timePerOutputToken", "from 1ms to 1h"),
    ("endpoint", "spec.slo.percentile", 49, "spec.slo.percentile", "greater than or equal to 50"),
    ("endpoint", "spec.engine.generationConfig", "vllm", "spec.engine.generationConfig", '"Model", "Neutral"'),
    ("endpoint", "spec.engine.device", "gpu", "spec.engine.device", '"auto", "cpu", "cuda"'),
    ("endpoint", "spec.engine.dtype", "float16", "spec.engine.dtype", '"auto", "float32", "bfloat16"'),
    ("endpoint", "spec.engine.numericsMode", "exact", "spec.engine.numericsMode", '"Fast", "Exact"'),
    ("endpoint", "spec.engine.maxRequests", 0, "spec.engine.maxRequests", "greater than or equal to 1"),
    ("endpoint", "spec.engine.maxBatchTokens", 64, "spec.engine.maxBatchTokens", "greater than or equal to 128"),
    ("endpoint", "spec.cors.allowOrigins", ["https://a.com/"], "spec.cors.allowOrigins[0]", "as browsers send it"),
    ("endpoint", "spec.cors.allowOrigins", ["a.com"], "spec.cors.allowOrigins[0]", "such as https://chat.example.com"),
    ("endpoint", KV_CACHE, "1Ki", KV_CACHE, "1Ki must be a quantity of bytes from 1Mi to 64Ti, such as 256Mi, 1.5Gi"),
    ("endpoint", KV_CACHE, "65Ti", KV_CACHE, "65Ti must be a quantity of bytes from 1Mi to 64Ti"),
    ("endpoint", KV_CACHE, 100, KV_CACHE, "100 must be a quantity of bytes from 1Mi to 64Ti"),
    ("endpoint", KV_CACHE, 1.5, KV_CACHE, "must be of type integer,string"),
    ("endpoint", ACTIVATIONS, "much", ACTIVATIONS, "much must be a quantity of bytes"),
    (
        "endpoint",
        ADAPTERS,
        [{"name": "a", "uri": "pvc://c/a"}],
        "spec.adapters[0].uri",
        "uri is reserved: leave it out",
    ),
    ("endpoint", ADAPTERS, [{"name": "a", "version": 0}], "spec.adapters[0].version", "greater than or equal to 1"),
    ("endpoint", ADAPTERS, [{"name": "a", "state": "Gone"}], "spec.adapters[0].state", '"Present", "Absent"'),
    ("endpoint", ADAPTERS, [{"name": "a"}, {"name": "a"}], "spec.adapters[1]", "Duplicate value"),
    ("endpoint", ADAPTERS, [{"name": "../a"}], "spec.adapters[0].name", "DNS-1123 label"),
    ("endpoint", "spec.replicas", 513, "spec.replicas", "less than or equal to 512"),
    (
        "endpoint",
        "spec.autoscaling",
        {"minReplicas": 3, "maxReplicas": 2},
        "spec.autoscaling.minReplicas",
        "minReplicas must be at most maxReplicas",
    ),
    ("endpoint", "spec.finetuning.policy", "Maybe", "spec.finetuning.policy", '"Allowed", "Disabled"'),
    (
        "endpoint",
        "spec.template.resources.limits",
        {"cpu": "two"},
        "spec.template.resources.limits[cpu]",
        "two must be a quantity from 0 to 1Ei, such as 2, 500m",
    ),
    ("endpoint", LIMITS, {"cpu": -1}, "spec.template.resources.limits[cpu]", "-1 must be a quantity from 0"),
    ("endpoint", LIMITS, {"cpu": 1.5}, "spec.template.resources.limits.cpu", "must be of type integer,string"),
    ("endpoint", ENV, [{"name": "COSERVE_THREADS"}], "spec.template.env[0].name", "these the operator sets"),
    ("endpoint", ENV, [{"name": "HOME"}], "spec.template.env[0].name", "'HOME' must be a variable name that"),
    ("endpoint", VOLUMES, [{"name": "coserve-tmp", "emptyDir": {}}], "spec.template.volumes[0].name", "'coserve-tmp'"),
    *(
        ("endpoint", MOUNTS, [{"name": "root", "mountPath": path}], f"{MOUNTS}[0].mountPath", f"'{path}' must be an")
        for path in ("/tmp", "/tmp/x", "/data", "/data/x", "/./tmp", "/x/.")
    ),
    ("endpoint", MOUNTS, [{"name": "root", "mountPath": "/models/x"}], MOUNTS, "mounts the claim of model.uri"),
    ("endpoint", MOUNTS, [{"name": "root", "mountPath": "/artifacts"}], MOUNTS, "the claim of artifactStore.uri"),
    ("endpoint", VOLUMES, [{"name": "root"}], "spec.template.volumes[0]", "set exactly one of emptyDir, configMap"),
    (
        "endpoint",
        VOLUMES,
        [{"name": "root", "hostPath": {"path": "/"}}],
        "spec.template.volumes[0].hostPath",
        "unknown",
    ),
    ("job", "metadata.name", "a.b", "metadata.name", "use only a-z, 0-9 and -"),
    ("job", "spec.endpointRef.name", "Tiny", "spec.endpointRef.name", "DNS-1123 label"),
    ("job", "spec.dataset.uri", "file:///models/x", "spec.dataset.uri", "file:///data/PATH"),
    ("job", "spec.dataset.evalPercent", 51, "spec.dataset.evalPercent", "less than or equal to 50"),
    ("job", "spec.adapter.name", "GSM8K", "spec.adapter.name", "DNS-1123 label"),
    ("job", "spec.adapter.rank", 0, "spec.adapter.rank", "greater than or equal to 1"),
    ("job", "spec.adapter.targetModules", ["lm_head"], "spec.adapter.targetModules[0]", '"q_proj", "k_proj"'),
    ("job", "spec.adapter.targetModules", ["q_proj"] * 2, "spec.adapter.targetModules[1]", "Duplicate value"),
    ("job", "spec.training.epochs", 1, "spec.training", "set exactly one of epochs and maxSteps"),
    ("job", "spec.training.maxSteps", None, "spec.training", "set exactly one of epochs and maxSteps"),
    ("job", "spec.training.learningRate", "0", "spec.training.learningRate", "decimal string above 0 and at most 1"),
    ("job", "spec.training.learningRate", "fast", "spec.training.learningRate", 'such as "2e-4"'),
    ("job", "spec.training.learningRate", 4e-3, "spec.training.learningRate", "must be of type string"),
    ("job", "spec.training.warmupSteps", 361, "spec.training.warmupSteps", "warmupSteps must be below maxSteps"),
    ("job", "spec.training.warmupSteps", 360, "spec.training.warmupSteps", "warmupSteps must be below maxSteps"),
    ("job", "spec.dataset.uri", "pvc://data/../x", "spec.dataset.uri", "the marks * and ?"),
    ("job", "spec.dataset.uri", "pvc://data/[ab]", "spec.dataset.uri", "the marks * and ?"),
    ("job", "spec.dataset.format", "sharegtp", "spec.dataset.format", '"sharegpt", "alpaca"'),
    ("job", "spec.dataset.learn", "First", "spec.dataset.learn", '"All", "Last"'),
    ("job", "spec.checkpoint.everySteps", 0, "spec.checkpoint.everySteps", "greater than or equal to 1"),
    ("job", "spec.publish.policy", "Best", "spec.publish.policy", "set evaluation.everySteps to 1 or more"),
    ("job", "spec.evaluation.patience", 2, "spec.evaluation.patience", "set everySteps to 1 or more"),
    ("job", "spec.evaluation.uri", "pvc://d/x", "spec.dataset.evalPercent", "leave dataset.evalPercent out"),
    ("job", "spec.evaluation.maxSamples", 0, "spec.evaluation.maxSamples", "greater than or equal to 1"),
    ("job", "spec.adapter.from", "pvc://d/../x", "spec.adapter.from", "name of an adapter that the endpoint has"),
    ("job", "spec.resumeFrom", {}, "spec.resumeFrom", "set job, or uri and sha256"),
    ("job", "spec.resumeFrom", {"uri": CHECKPOINT}, "spec.resumeFrom", "set job, or uri and sha256"),
    ("job", "spec.resumeFrom", {"job": "a", "sha256": "0" * 64}, "spec.resumeFrom", "set job, or uri and sha256"),
    (
        "job",
        "spec.resumeFrom",
        {"uri": "pvc://a/x", "sha256": "0" * 64},
        "spec.resumeFrom.uri",
        "/jobs/UID/eEPOCH/sSTEP",
    ),
    ("job", "spec.resumeFrom", {"uri": CHECKPOINT, "sha256": "0"}, "spec.resumeFrom.sha256", "[0-9a-f]{64}"),
    ("job", "spec.publsh", {"policy": "Never"}, "spec.publsh", "unknown field"),
]


@pytest.mark.parametrize(("which", "path", "value", "field", "remedy"), FAULTS)
def test_a_fault_is_refused_with_its_field_and_what_to_write(api, which, path, value, field, remedy) -> None:
    body = with_value(EXAMPLES[which], path, value)
    done = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(body))
    assert done.returncode != 0, done.stdout
    assert field in done.stderr
    assert remedy in done.stderr


@pytest.mark.parametrize(
    ("value", "size"), [("1.5Gi", 3 * 2**29), ("1e9", 10**9), ("1E9", 10**9), (2**30, 2**30), ("2000.5k", 2_000_500)]
)
def test_every_form_of_a_quantity_is_accepted(api, value, size) -> None:
    body = with_value(with_value(EXAMPLES["endpoint"], KV_CACHE, value), ACTIVATIONS, value)
    body = with_value(body, LIMITS, {"memory": value, "example.com/x": 2, "cpu": "500m", "hugepages-2Mi": "1Pi"})
    done = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-o=json", "-f", "-", stdin=json.dumps(body))
    assert done.returncode == 0, done.stderr
    spec = InferenceEndpoint.from_dict(json.loads(done.stdout)).spec
    assert quantity_bytes(spec.engine.kv_cache_memory or "") == size


def test_a_file_uris_volume_may_be_mounted_where_it_says(api) -> None:
    body = with_value(EXAMPLES["endpoint"], "spec.model.uri", "file:///models/x")
    body = with_value(body, "spec.artifactStore.uri", "file:///artifacts")
    mounts = [{"name": "root", "mountPath": path} for path in ("/models/x", "/artifacts", "/modelsx", "/tmpx")]
    done = api.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(with_value(body, MOUNTS, mounts)))
    assert done.returncode == 0, done.stderr


def without_held_out(**parts: Any) -> dict[str, Any]:
    """The example without dataset.evalPercent, which has a default that depends on evaluation.uri."""
    body = with_value(EXAMPLES["job"], "spec.dataset.evalPercent", None)
    for name, value in parts.items():
        body = with_value(body, f"spec.{name}", value)
    return body


@pytest.mark.parametrize(
    ("parts", "remedy"),
    [
        ({"publish": {"policy": "Best"}, "evaluation": {"everySteps": 5, "patience": 2}}, ""),
        ({"publish": {"policy": "Best"}, "evaluation": {"everySteps": 5, "uri": "pvc://d/x"}}, ""),
        ({"publish": {"policy": "IfEvalImproves"}, "evaluation": {"uri": "pvc://d/x"}}, ""),
        ({"adapter": {"name": "a", "from": "other"}}, ""),
        ({"resumeFrom": {"job": "other"}}, ""),
        ({"resumeFrom": {"uri": CHECKPOINT, "sha256": "0" * 64}}, ""),
        ({"adapter": {"name": "a", "from": "other"}, "resumeFrom": {"job": "b"}}, "leave one of them out"),
        ({"adapter": {"name": "a", "from": "pvc://models/x", "rank": 4}}, ""),
        ({"publish": {"policy": "Best"}, "evaluation": {"everySteps": 5}, "dataset.evalPercent": 0}, "need held-out"),
        ({"evaluation": {"everySteps": 5, "patience": 2}, "dataset.evalPercent": 0}, "need held-out samples"),
        ({"publish": {"policy": "IfEvalImproves"}, "dataset.evalPercent": 0}, "need held-out samples"),
    ],
)
def test_what_is_decided_by_evaluations_needs_them(api, parts, remedy) -> None:
    body = without_held_out(**parts)
    done = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(body))
    assert (done.returncode == 0) == (remedy == ""), done.stderr
    assert remedy in done.stderr


def test_an_unquoted_learning_rate_is_a_number_and_refused(api) -> None:
    text = (ROOT / "examples" / "job.yaml").read_text()
    assert 'learningRate: "4e-3"' in text
    done = api.kubectl("apply", "--dry-run=server", "-f", "-", stdin=text.replace('"4e-3"', "4e-3"))
    assert done.returncode != 0
    assert "spec.training.learningRate" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_accepted_as_written(api, path) -> None:
    done = api.kubectl("apply", "--dry-run=server", "-f", str(path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("which", "what", "model"), [("endpoint", "iep/tiny", EndpointSpec), ("job", "ftj/gsm8k-json", JobSpec)]
)
def test_an_example_comes_back_with_its_values_and_the_models_defaults(objects, which, what, model) -> None:
    stored, written = get(objects, what)["spec"], EXAMPLES[which]["spec"]
    assert model.model_validate(stored) == model.model_validate(written)
    assert contains(stored, written)
    defaults = model.model_validate(written).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert without_empty(stored) == without_empty(defaults)


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return all(name in whole and contains(whole[name], value) for name, value in part.items())
    return bool(whole == part)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: without_empty(child) for name, child in value.items()}
        return {name: child for name, child in kept.items() if child not in ({}, [])}
    return value


def test_what_applies_again_changes_nothing(objects) -> None:
    for which, what in (("endpoint", "iep/tiny"), ("job", "ftj/gsm8k-json")):
        before = get(objects, what)["metadata"]["resourceVersion"]
        done = objects.kubectl("apply", "-f", str(ROOT / "examples" / f"{which}.yaml"))
        assert "unchanged" in done.stdout, done.stderr
        assert get(objects, what)["metadata"]["resourceVersion"] == before


def test_scale_reads_and_writes_replicas(objects) -> None:
    status = EndpointStatus(replicas=2, selector="coserve.dev/endpoint=tiny").to_dict()
    assert patch(objects, "iep/tiny", {"status": status}, "--subresource=status") == ""
    done = objects.kubectl("scale", "iep/tiny", "--replicas=5")
    assert done.returncode == 0, done.stderr
    scale = get(objects, "iep/tiny", "--subresource=scale")
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (5, 2)
    assert scale["status"]["selector"] == "coserve.dev/endpoint=tiny"
    assert get(objects, "iep/tiny")["spec"]["replicas"] == 5


def test_scale_works_where_replicas_was_never_written(objects) -> None:
    body = with_value(EXAMPLES["endpoint"], "spec.replicas", None)
    objects.kubectl("delete", "iep/tiny")
    objects.kubectl("apply", "-f", "-", stdin=json.dumps(body))
    assert get(objects, "iep/tiny")["spec"]["replicas"] == 1
    assert objects.kubectl("scale", "iep/tiny", "--replicas=3").returncode == 0
    assert "configured" not in objects.kubectl("apply", "-f", "-", stdin=json.dumps(body)).stdout
    assert get(objects, "iep/tiny")["spec"]["replicas"] == 3


def test_an_autoscaled_endpoint_gets_the_defaults_below(objects) -> None:
    assert patch(objects, "iep/tiny", {"spec": {"autoscaling": {"maxReplicas": 4}}}) == ""
    assert get(objects, "iep/tiny")["spec"]["autoscaling"] == {
        "minReplicas": 1,
        "maxReplicas": 4,
        "targetSaturationPercent": 70,
        "behavior": {"scaleUp": {"stabilizationWindow": "0s"}, "scaleDown": {"stabilizationWindow": "5m"}},
    }


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ({"model": {"uri": "pvc://other/model"}}, "spec.model", "create another endpoint for another model"),
        ({"model": {"maxModelLength": 2048}}, "spec.model", "model is immutable"),
        ({"model": {"name": "other"}}, "spec.model", "model is immutable"),
        ({"model": None}, "spec.model", "Required value"),
        ({"artifactStore": {"uri": "pvc://other/"}}, "spec.artifactStore", "artifactStore is immutable"),
        ({"artifactStore": None}, "spec.artifactStore", "Required value"),
    ],
)
def test_an_endpoints_model_and_store_stay(objects, change, field, remedy) -> None:
    answer = patch(objects, "iep/tiny", {"spec": change})
    assert field in answer
    assert remedy in answer


def test_a_pod_template_comes_back_as_the_model_reads_it(objects) -> None:
    template = {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}, "requests": {"cpu": "2", "memory": "4Gi"}},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}],
        "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
        "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    }
    assert patch(objects, "iep/tiny", {"spec": {"template": template}}) == ""
    stored = EndpointSpec.model_validate(get(objects, "iep/tiny")["spec"]).template
    assert stored.resources.limits == {"nvidia.com/gpu": "1", "memory": "8Gi"}
    assert stored.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True) == {
        **template,
        "resources": {**template["resources"], "limits": {"nvidia.com/gpu": "1", "memory": "8Gi"}},
    }


def test_a_models_name_cannot_be_taken_away(objects) -> None:
    objects.kubectl("delete", "iep/tiny")
    named = with_value(EXAMPLES["endpoint"], "spec.model.name", "org/tiny")
    objects.kubectl("apply", "-f", "-", stdin=json.dumps(named))
    assert "model is immutable" in patch(objects, "iep/tiny", {"spec": {"model": {"name": None}}})


CHANGES: dict[str, tuple[Any, Any]] = {  # field -> before the start, after it
    "endpointRef": ({"name": "other"}, {"name": "third"}),
    "dataset": ({"evalPercent": 6}, {"evalPercent": 7}),
    "adapter": ({"rank": 16}, {"targetModules": ["q_proj"]}),
    "resumeFrom": ({"job": "other"}, {"job": "third"}),
    "training": ({"seed": 7}, {"seed": None}),
    "evaluation": ({"everySteps": 5}, {"everySteps": 6}),
}
FREE: dict[str, Any] = {
    "checkpoint": {"everySteps": 3, "keep": 4},
    "publish": {"policy": "Best"},
    "priority": 2,
    "backoffLimit": None,
    "suspend": True,
    "activeDeadlineSeconds": 3600,
    "ttlSecondsAfterFinished": 0,
}


def test_what_decides_the_training_of_a_started_job_is_frozen_and_nothing_else(objects) -> None:
    for field, (before, _) in CHANGES.items():
        assert patch(objects, "ftj/gsm8k-json", {"spec": {field: before}}) == ""
    started = {"status": {"startTime": "2026-11-21T04:00:00Z"}}
    assert patch(objects, "ftj/gsm8k-json", started, "--subresource=status") == ""
    for field, (_, after) in CHANGES.items():
        answer = patch(objects, "ftj/gsm8k-json", {"spec": {field: after}})
        assert f"spec.{field}: Invalid value" in answer
        assert f"{field} is immutable once the job has started" in answer
    longer = {"spec": {"training": {"maxSteps": None, "epochs": 1}}}
    assert "training is immutable" in patch(objects, "ftj/gsm8k-json", longer)
    for field, value in FREE.items():
        assert patch(objects, "ftj/gsm8k-json", {"spec": {field: value}}) == ""
    answer = patch(objects, "ftj/gsm8k-json", {"spec": {"checkpoint": {"everySteps": 0}}})
    assert "spec.checkpoint.everySteps: Invalid value" in answer, "what is free is still checked"
    assert "activeDeadlineSeconds: Invalid value" in patch(
        objects, "ftj/gsm8k-json", {"spec": {"activeDeadlineSeconds": 0}}
    )
    assert patch(objects, "ftj/gsm8k-json", {"status": {"state": "Suspended"}}, "--subresource=status") == ""


def test_every_field_of_the_spec_is_tried() -> None:
    assert tuple(CHANGES) == FROZEN
    assert {*CHANGES, *FREE} == {field.alias for field in JobSpec.model_fields.values()}


def test_the_status_of_a_job_shows_in_its_columns(objects, now) -> None:
    columns = ["NAME", "STATE", "REASON", "ENDPOINT", "PROGRESS", "LOSS", "ETA", "ADAPTER", "AGE"]
    assert header(objects, "ftj") == columns
    status = JobStatus(
        state=JobState.RUNNING,
        reason="Training",
        progress=Progress(
            step=42,
            total_steps=100,
            percent=42,
            tokens=9999,
            loss="1.25",
            eval_loss="2e-05",
            eta="2m12s",
            best_step=20,
            best_eval_loss="1e-05",
            evaluations=(EvaluationStatus(step=20, loss="1e-05"), EvaluationStatus(step=40)),
        ),
        binding=BindingStatus(agent="tiny-0", node="dev-1", epoch=3),
        checkpoint=CheckpointStatus(step=40, cursor=40, epoch=3, uri="pvc://a/jobs/j/e3/s40", sha256="0" * 64),
        adapter=PublishedAdapter(name="gsm8k-json", version=1, uri="pvc://a/adapters/x/v1", sha256="0" * 64, rank=8),
        continued_from=ContinuedFrom(uri="pvc://a/adapters/y/v2", version=2, sha256="0" * 64),
        endpoint_template_variables='{"enable_thinking": false, "x": null}',
        restarts=1,
        backoff=BackoffStatus(attempts=1, reason="AgentLost", message="lost", until=timestamp(now)),
        observed_generation=1,
        start_time=timestamp(now),
        conditions=(condition("Running", True, "Training", "", generation=1, now=now),),
    )
    assert patch(objects, "ftj/gsm8k-json", {"status": status.to_dict()}, "--subresource=status") == ""
    assert JobStatus.model_validate(get(objects, "ftj/gsm8k-json")["status"]) == status
    shown = "gsm8k-json Running Training tiny 42 1.25 2m12s gsm8k-json"
    assert row(objects, "ftj")[:-1] == shown.split()


def test_the_status_of_an_endpoint_shows_in_its_columns(objects, now) -> None:
    assert header(objects, "iep") == ["NAME", "READY", "REASON", "REPLICAS", "SLO%", "JOBS", "AGE"]
    status = EndpointStatus(
        replicas=2,
        ready_replicas=2,
        slo=SloStatus(ttft_millis=310, tpot_millis=45, attainment_percent=99),
        jobs=1,
        conditions=(condition("Ready", True, "AgentsReady", "2 of 2", generation=1, now=now),),
    )
    assert patch(objects, "iep/tiny", {"status": status.to_dict()}, "--subresource=status") == ""
    assert EndpointStatus.model_validate(get(objects, "iep/tiny")["status"]) == status
    assert row(objects, "iep")[:-1] == ["tiny", "True", "AgentsReady", "2", "99", "1"]


def test_a_wait_for_a_condition_ends(objects, now) -> None:
    status = JobStatus(conditions=(condition("Complete", True, "Published", "", generation=1, now=now),)).to_dict()
    patch(objects, "ftj/gsm8k-json", {"status": status}, "--subresource=status")
    done = objects.kubectl("wait", "--for=condition=Complete", "ftj/gsm8k-json", "--timeout=5s")
    assert done.returncode == 0, done.stderr


def test_the_category_lists_both_kinds(objects) -> None:
    names = objects.kubectl("get", "coserve", "-o", "name").stdout.split()
    assert sorted(names) == ["finetunejob.coserve.dev/gsm8k-json", "inferenceendpoint.coserve.dev/tiny"]


def header(api, kind: str) -> list[str]:
    return api.kubectl("get", kind).stdout.splitlines()[0].split()


def row(api, kind: str) -> list[str]:
    return api.kubectl("get", kind).stdout.splitlines()[1].split()
