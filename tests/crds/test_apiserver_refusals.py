"""Which objects a real API server refuses by the CRDs, and how it says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_objects import EXAMPLES, ROOT, with_value

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.quantities import quantity_bytes

pytestmark = pytest.mark.apiserver
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
    (
        "endpoint",
        "spec.engine.toolCallParser",
        "xml",
        "spec.engine.toolCallParser",
        '"hermes", "llama3_json", "mistral"',
    ),
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
