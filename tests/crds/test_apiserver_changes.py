"""Which changes of an object a real API server refuses by the CRDs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_objects import EXAMPLES, patch, with_value

from coserve_api.job import FROZEN, JobSpec

pytestmark = pytest.mark.apiserver


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
