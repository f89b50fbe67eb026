"""What a job may ask for, and the words for what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from standalone_jobs import SHA, SPEC, checkpoint, job

from coserve_agent.http.errors import ApiError
from coserve_agent.settings import AgentSettings
from coserve_agent.standalone.admission import MOST_JOBS, There, admitted
from coserve_agent.standalone.job import Ended, Job, State
from coserve_agent.standalone.spec import parse_job
from coserve_agent.standalone.told import binding_of, feeder_environment
from coserve_agent.standalone.told import outside as outside_of
from coserve_api.job import JobSpec
from coserve_contract.messages import AdapterRecord

NOTHING = There({}, {}, {})
OVER = job("old", ended=Ended(state=State.COMPLETED, at_s=1.0), number=3)
PUBLISHED = AdapterRecord(name="counts", number=4, path="adapters/local/counts/v4", sha256=SHA, job_uid="x", rank=8)
THERE = There({"old": OVER}, {"counts": PUBLISHED}, {OVER.uid: checkpoint(24)})


def settings(**changes: Any) -> AgentSettings:
    return AgentSettings(**{"model_path": Path("/models/m"), "state": Path("/state")} | changes)


def taken(spec: dict[str, Any] | None = None, there: There = NOTHING, name: str | None = None, **changes: Any) -> Job:
    return admitted(parse_job({"name": name, "spec": SPEC | (spec or {})}), there, settings(**changes), 5.0)


def refusal(spec: dict[str, Any], there: There = NOTHING, **changes: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        taken(spec, there, **changes)
    return refused.value


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"dataset": {"uri": "rows.jsonl"}}, "spec.dataset.uri", "'rows.jsonl' must be an absolute path"),
        ({"dataset": {"uri": "/data/../etc"}}, "spec.dataset.uri", "without '..'"),
        ({"dataset": {"uri": "pvc://claim/x"}}, "spec.dataset.uri", "must be an absolute path"),
        ({"dataset": {}}, "spec.dataset.uri", "is missing"),
        ({"dataset": {"uri": "/x", "epochs": 1}}, "spec.dataset.epochs", "is unknown: leave it out; there are date"),
        ({"optimizer": "sgd"}, "spec.optimizer", "is unknown"),
        ({"training": {"maxSteps": 0}}, "spec.training.maxSteps", "is 0: "),
        ({"training": {"maxSteps": 1, "learningRate": 0.1}}, "spec.training.learningRate", "as a string, in quotes"),
        ({"training": {}}, "spec.training", "set exactly one of epochs and maxSteps"),
        ({"adapter": {"name": "a", "rank": 65}}, "spec.adapter.rank", "is 65, and this server allows up to 64"),
        ({"adapter": {"name": "model"}}, "spec.adapter.name", "the base model's name"),
        (
            {"adapter": {"name": "a", "from": "b"}},
            "spec.adapter.from",
            "is 'b': name a published adapter",
        ),
        ({"resumeFrom": {"job": "b"}}, "spec.resumeFrom.job", "name a job that is over; there are: none"),
        (
            {"dataset": {"uri": "/x", "maxSequenceLength": 2048}},
            "spec.dataset.maxSequenceLength",
            "this server's is 1024",
        ),
        ({"publish": {"policy": "Best"}}, "spec", "set evaluation.everySteps to 1 or more"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(spec: dict[str, Any], field: str, words: str) -> None:
    error = refusal(spec)
    assert (error.status, error.param) == (400, field)
    assert words in str(error)


def test_a_job_gets_a_name_and_the_next_version_of_its_adapter() -> None:
    made = taken()
    assert made.name.startswith("counts-")
    assert (made.number, made.created_s, made.suspended) == (1, 5.0, False)
    assert taken(there=THERE).number == 5
    assert taken({"suspend": True}).suspended


def test_a_name_is_taken_once_and_jobs_are_bounded() -> None:
    with pytest.raises(ApiError, match="name is 'old', and there is a job of that name") as refused:
        taken(there=THERE, name="old")
    assert (refused.value.status, refused.value.code) == (409, "name_taken")
    full = There({str(n): OVER for n in range(MOST_JOBS)}, {}, {})
    assert refusal({}, full).status == 409


def test_data_lie_below_the_folders_that_may_be_read_by_real_path(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    for path in (outside / "x.jsonl", root / "link" / "x.jsonl"):
        error = refusal({"dataset": {"uri": str(path)}}, data_roots=(root,))
        assert error.param == "spec.dataset.uri"
        assert "name its folder in COSERVE_DATA_ROOTS" in str(error)
    held_out = {"dataset": {"uri": f"{root}/x"}, "evaluation": {"uri": f"{outside}/x"}}
    assert refusal(held_out, data_roots=(root,)).param == "spec.evaluation.uri"
    (root / "circle").symlink_to(root / "circle")
    assert "does not lead anywhere" in str(refusal({"dataset": {"uri": f"{root}/circle"}}, data_roots=(root,)))
    made = taken({"dataset": {"uri": f"file://{root}/*.jsonl"}}, data_roots=(outside, root))
    assert outside_of(made, settings(data_roots=(outside, root))) is None
    assert "lies outside" in str(outside_of(made, settings(data_roots=(outside,)))), "as after another start"
    variables = feeder_environment(made, settings(data_roots=(outside, root)))
    assert variables["COSERVE_DATASET_PATH"] == f"{root}/*.jsonl"
    assert variables["COSERVE_DATASET_ROOT"] == str(root), "the feeder lets no link lead out of it"


def test_a_job_goes_on_from_an_adapter_or_from_a_job_that_is_over() -> None:
    start = taken({"adapter": {"name": "more", "from": "counts"}}, THERE).start
    assert start is not None
    assert (start.path, start.sha256, start.rank) == (PUBLISHED.path, SHA, None)
    made = taken({"resumeFrom": {"job": "old"}, "adapter": {"name": "more"}}, THERE)
    assert (made.resume, made.start and made.start.path) == (checkpoint(24), checkpoint(24).path)
    assert binding_of(made, 7, settings()).resume == checkpoint(24)


def test_a_spec_is_that_of_the_custom_resource() -> None:
    """A job moves to a cluster as it is, but for where its data lie."""
    made = taken({"dataset": {"uri": "/x", "templateVariables": {"thinking": None}}})
    moved = made.spec.model_dump(mode="json", by_alias=True)
    moved["dataset"]["uri"] = "pvc://claim/x"
    assert JobSpec.model_validate(moved).training == made.spec.training
    assert Job.loads("", made.dumps()) == made


def test_finetuning_that_is_disabled_takes_no_job() -> None:
    assert "start it with Allowed" in str(refusal({}, finetuning="Disabled"))
