"""What a real API server makes of the CRDs: defaults, /scale, columns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_objects import EXAMPLES, ROOT, get, patch, with_value

from coserve_api.common import timestamp
from coserve_api.conditions import condition
from coserve_api.endpoint import EndpointSpec
from coserve_api.endpoint_status import EndpointStatus, SloStatus
from coserve_api.job import JobSpec
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

pytestmark = pytest.mark.apiserver


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
