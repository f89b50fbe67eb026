"""The custom resources' models: their scalars, URIs, conditions and examples."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coserve_api.common import duration_ms, format_decimal, format_duration, timestamp
from coserve_api.conditions import Condition, ConditionStatus, condition, find_condition, merge_conditions
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.generate import definitions
from coserve_api.job import FinetuneJob, JobSpec
from coserve_api.job_status import Progress
from coserve_api.quantities import quantity, quantity_bytes
from coserve_api.uris import (
    Location,
    artifact_uri,
    artifacts_path,
    dataset_path,
    dataset_root,
    model_path,
    parse_uri,
    relative_path,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
NOW = datetime(2026, 11, 21, 4, 0, 0, tzinfo=UTC)


def example(name: str) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return body


@pytest.mark.parametrize(
    ("text", "ms"),
    [("200ms", 200), ("1s", 1000), ("1m30s", 90_000), ("1h", 3_600_000), ("1h1ms", 3_600_001), ("0s", 0)],
)
def test_durations_are_read(text: str, ms: int) -> None:
    assert duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "1", "1 s", "1.5s", "s", "-1s", "1s1m", "1s\n", "\uff11s", "1d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="duration such as 200ms"):
        duration_ms(text)


@given(st.integers(0, 35_999_999_999))
def test_a_formatted_duration_reads_back(ms: int) -> None:
    assert duration_ms(format_duration(ms)) == ms


def test_quantities_are_read_exactly_as_kubernetes_does() -> None:
    sizes = {
        "256Mi": 2**28, "1k": 1000, "40Gi": 40 * 2**30, "7": 7, "1.5Gi": 3 * 2**29, "1e3": 1000, "1E3": 1000,
        "1Pi": 2**50, "1E": 10**18, ".5Ki": 512, "1.": 1, "100m": 1, "0.1Ki": 103, "25e-1": 3,
    }  # fmt: skip
    assert {text: quantity_bytes(text) for text in sizes} == sizes
    assert quantity("1.1") == Fraction(11, 10)
    for text in ("", "-1", "1 Gi", "1KiB", "Gi", ".", "1e", "1e333", "\uff11", "1\n", "1" * 33):
        with pytest.raises(InvalidValueError, match=r"such as 2, 500m, 1\.5Gi or 1e3"):
            quantity(text)


def test_a_number_with_a_point_is_to_be_quoted() -> None:
    body = example("endpoint.yaml")
    body["spec"]["engine"] = {"kvCacheMemory": 1.5}
    with pytest.raises(ValidationError, match=r'write it in quotes, "1\.5"'):
        InferenceEndpoint.from_dict(body)
    body["spec"]["engine"] = {"kvCacheMemory": 2**28}
    assert InferenceEndpoint.from_dict(body).spec.engine.kv_cache_memory == "268435456"


@given(st.floats(-1e12, 1e12))
def test_a_measured_number_fits_its_field(value: float) -> None:
    assert Progress(loss=format_decimal(value)).loss is not None


def test_uris_become_paths_in_the_pod() -> None:
    assert parse_uri("pvc://claim/a/b.c") == Location("claim", "a/b.c")
    assert parse_uri("pvc://claim/") == parse_uri("pvc://claim") == Location("claim", "")
    assert model_path("pvc://coserve-demo/base-model") == "/models/coserve-demo/base-model"
    assert model_path("pvc://coserve-demo/") == "/models/coserve-demo"
    assert model_path("file:///models/tiny") == "/models/tiny"
    assert dataset_path("pvc://coserve-demo/job.jsonl") == "/data/coserve-demo/job.jsonl"
    assert dataset_path("pvc://coserve-demo/a?/*.jsonl.gz") == "/data/coserve-demo/a?/*.jsonl.gz"
    assert dataset_path("file:///data/team/*") == "/data/team/*"
    assert dataset_root("pvc://coserve-demo/a/b.jsonl") == dataset_root("pvc://coserve-demo") == "/data/coserve-demo"
    assert dataset_root("file:///data/team/x.jsonl") == "/data"
    assert artifacts_path("pvc://coserve-artifacts/") == "/artifacts"
    assert artifacts_path("pvc://coserve-artifacts/team") == "/artifacts/team"
    assert artifacts_path("file:///artifacts/team/") == "/artifacts/team"


def test_an_artifacts_uri_and_its_path_belong_together() -> None:
    for store in ("pvc://claim", "pvc://claim/", "pvc://claim/team", "file:///artifacts"):
        assert relative_path(store, artifact_uri(store, "jobs/j/e1/s20")) == "jobs/j/e1/s20"
    with pytest.raises(InvalidValueError, match="not below"):
        relative_path("pvc://claim/team", "pvc://claim/teammate/x")


@given(
    st.sampled_from(["pvc://claim/", "file:///models/", "file:///", "pvc://"]),
    st.text(alphabet=st.sampled_from("./\\~ a%\n\0:"), max_size=12),
)
def test_no_uri_leaves_its_folder(start: str, rest: str) -> None:
    try:
        path = model_path(start + rest)
    except InvalidValueError:
        return
    assert not {"..", ".", ""} & set(path.split("/")[1:]), path
    assert re.fullmatch("[A-Za-z0-9._=+@/-]+", path)


def test_a_transition_time_changes_only_with_the_status() -> None:
    first = condition("Ready", True, "AllReady", "", generation=1, now=NOW)
    later = condition("Ready", True, "SomeReady", "one is slow", generation=2, now=NOW + timedelta(minutes=1))
    merged = merge_conditions([first], [later])
    assert merged == (later.model_copy(update={"last_transition_time": first.last_transition_time}),)
    lost = condition("Ready", False, "NoneReady", "", generation=2, now=NOW + timedelta(minutes=2))
    (after,) = merge_conditions(merged, [lost])
    assert after.last_transition_time == "2026-11-21T04:02:00Z"


def test_conditions_of_other_types_stay_in_place() -> None:
    old = [condition(name, None, "Starting", "", generation=1, now=NOW) for name in ("Ready", "SLOMet")]
    merged = merge_conditions(old, [condition("SLOMet", True, "Met", "x" * 4000, generation=1, now=NOW)])
    assert [each.type for each in merged] == ["Ready", "SLOMet"]
    assert merged[0].status is ConditionStatus.UNKNOWN
    assert len(merged[1].message) == 2048
    assert find_condition(merged, "SLOMet") == merged[1]
    assert find_condition(merged, "Bound") is None
    assert Condition.model_validate(merged[1].to_dict()) == merged[1]


def test_times_are_written_in_utc() -> None:
    assert timestamp(datetime.fromisoformat("2026-11-21T06:00:00.9+02:00")) == "2026-11-21T04:00:00Z"


def test_the_examples_are_valid_and_name_each_other() -> None:
    endpoint = InferenceEndpoint.from_dict(example("endpoint.yaml"))
    job = FinetuneJob.from_dict(example("job.yaml"))
    assert job.spec.endpoint_ref.name == endpoint.metadata.name == endpoint.model_name
    assert job.spec.adapter.rank <= endpoint.spec.finetuning.max_rank


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("endpoint*.yaml")), ids=lambda path: path.name)
def test_every_example_of_an_endpoint_is_valid(path: Path) -> None:
    InferenceEndpoint.from_dict(example(path.name))


def test_what_the_device_decides_is_open_where_it_is_not_said() -> None:
    """A default filled in by the API server could not be told from a choice."""
    engine = InferenceEndpoint.from_dict(example("endpoint-gpu.yaml")).spec.engine
    assert (engine.device, engine.dtype) == ("cuda", "auto")
    assert (engine.max_requests, engine.max_batch_tokens, engine.kv_cache_memory) == (None, None, None)
    schema = definitions()["inferenceendpoints.yaml"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fields = schema["properties"]["spec"]["properties"]["engine"]["properties"]
    assert {name for name, field in fields.items() if "default" not in field} >= {
        "maxRequests",
        "maxBatchTokens",
        "kvCacheMemory",
    }


def test_an_unknown_field_of_a_spec_is_ignored_and_of_a_status_kept() -> None:
    """As an operator sees it that was rolled back; the API server warns of fields that its CRD does not know."""
    body = example("job.yaml")
    assert FinetuneJob.from_dict({**body, "spec": {**body["spec"], "fromTheFuture": {}}}) == FinetuneJob.from_dict(body)
    status = {"state": "Running", "fromTheFuture": 1, "binding": {"agent": "a", "epoch": 1, "alsoNew": [2]}}
    job = FinetuneJob.from_dict({**body, "status": status})
    assert job.status.state == "Running"
    assert job.status.unknown == {"fromTheFuture": 1}
    told = job.status.to_dict()
    assert told["fromTheFuture"] == 1
    assert told["binding"]["alsoNew"] == [2]


@pytest.mark.parametrize("training", [{}, {"epochs": 1, "maxSteps": 2}])
def test_a_job_has_exactly_one_length(training: dict[str, int]) -> None:
    spec = example("job.yaml")["spec"]
    with pytest.raises(ValidationError, match="exactly one of epochs and maxSteps"):
        JobSpec.model_validate({**spec, "training": training})


def test_a_warm_up_is_below_the_length() -> None:
    """Equality was allowed once: such an object is read as long as it is stored, and no new one is made."""
    body = example("job.yaml")

    def with_warm_up(steps: int) -> dict[str, Any]:
        training = {"maxSteps": 10, "warmupSteps": steps}
        return {**body, "spec": {**body["spec"], "training": training}}

    assert FinetuneJob.from_dict(with_warm_up(9)) == FinetuneJob.model_validate(with_warm_up(9))
    assert FinetuneJob.from_dict(with_warm_up(10)).spec.training.warmup_steps == 10
    for steps in (10, 11):
        with pytest.raises(ValidationError, match="warmupSteps must be below maxSteps"):
            JobSpec.model_validate(with_warm_up(steps)["spec"])
    with pytest.raises(ValidationError, match="warmupSteps must be below maxSteps"):
        FinetuneJob.from_dict(with_warm_up(11))


def test_a_bad_value_is_answered_with_what_to_write() -> None:
    spec = example("job.yaml")["spec"]
    with pytest.raises(ValidationError, match=r"training\.learningRate\n.*'fast' must be a decimal string above 0"):
        JobSpec.model_validate({**spec, "training": {"maxSteps": 1, "learningRate": "fast"}})


def test_a_policy_that_asks_for_an_evaluation_needs_samples_for_it() -> None:
    spec = example("job.yaml")["spec"]
    wanted = {**spec, "publish": {"policy": "IfEvalImproves"}}
    assert JobSpec.model_validate({**wanted, "dataset": {**spec["dataset"], "evalPercent": 5}})
    with pytest.raises(ValidationError, match=r"need held-out samples: leave dataset.evalPercent out"):
        JobSpec.model_validate({**wanted, "dataset": {**spec["dataset"], "evalPercent": 0}})


SOMETIMES = {"everySteps": 5}
FILE = {"uri": "pvc://d/e.jsonl"}


@pytest.mark.parametrize(
    ("dataset", "evaluation", "policy", "words"),
    [
        ({}, SOMETIMES, "Best", ""),
        ({}, SOMETIMES | {"patience": 2}, "Always", ""),
        ({}, FILE | SOMETIMES | {"patience": 2}, "Best", ""),
        ({"evalPercent": 0}, FILE | SOMETIMES, "Best", ""),
        ({"evalPercent": 0}, FILE, "IfEvalImproves", ""),
        ({"evalPercent": 0}, SOMETIMES, "Always", ""),
        ({"evalPercent": 0}, SOMETIMES, "Best", "need held-out samples"),
        ({"evalPercent": 0}, SOMETIMES | {"patience": 2}, "Always", "need held-out samples"),
        ({"evalPercent": 5}, FILE, "Always", "evaluation.uri has the held-out samples"),
        ({}, {}, "Best", "set evaluation.everySteps to 1 or more"),
        ({}, {"patience": 1}, "Always", "set everySteps to 1 or more"),
    ],
)
def test_what_is_decided_by_evaluations_needs_them(
    dataset: dict[str, Any], evaluation: dict[str, Any], policy: str, words: str
) -> None:
    spec = example("job.yaml")["spec"]
    held_out = {name: value for name, value in spec["dataset"].items() if name != "evalPercent"} | dataset
    wanted = {**spec, "dataset": held_out, "evaluation": evaluation, "publish": {"policy": policy}}
    if not words:
        assert JobSpec.model_validate(wanted).eval_percent == (
            dataset.get("evalPercent", 0 if "uri" in evaluation else 5)
        )
        return
    with pytest.raises(ValidationError, match=words):
        JobSpec.model_validate(wanted)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("adapter", "dropout", "0.95"),
        ("adapter", "dropout", 0.1),
        ("adapter", "useRslora", True),
        ("training", "adamBeta1", "1"),
        ("training", "adamBeta2", "1.5"),
        ("training", "adamEpsilon", "0"),
        ("evaluation", "everySteps", -1),
        ("evaluation", "maxSamples", 0),
        ("evaluation", "patience", 0),
        ("evaluation", "uri", "pvc://claim/../x"),
        ("adapter", "from", "pvc://claim/../x"),
        ("adapter", "from", "file:///data/adapter"),
        ("adapter", "from", "Not A Name"),
    ],
)
def test_values_outside_their_bounds_are_refused(part: str, field: str, value: object) -> None:
    spec = example("job.yaml")["spec"]
    with pytest.raises(ValidationError, match=field):
        JobSpec.model_validate({**spec, part: {**spec.get(part, {}), field: value}})


@pytest.mark.parametrize("priority", [-5, 5])
def test_a_priority_is_bounded(priority: int) -> None:
    with pytest.raises(ValidationError, match="priority"):
        JobSpec.model_validate({**example("job.yaml")["spec"], "priority": priority})
