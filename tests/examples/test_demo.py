"""What the demo decides from what it measures."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from demo.__main__ import CASES, EXAMPLES, JOB, LEAST_STEPS, fitting_steps

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob


def job(max_steps: int, step: int, tokens: int) -> dict[str, Any]:
    return {"spec": {"training": {"maxSteps": max_steps}}, "status": {"progress": {"step": step, "tokens": tokens}}}


@pytest.mark.parametrize("tokens_per_s", (3000.0, 4500.0, 40_000.0))
def test_a_job_that_ends_with_the_traffic_stays_as_it_is(tokens_per_s: float) -> None:
    assert fitting_steps(job(360, 10, 10_000), tokens_per_s, 120.0) is None


def test_on_a_slow_machine_it_takes_as_long_as_the_traffic() -> None:
    steps = fitting_steps(job(360, 10, 10_000), 2000.0, 120.0)
    assert steps == 192
    assert steps * 1000 / (0.8 * 2000.0) == pytest.approx(120.0)


def test_it_always_learns_something() -> None:
    assert fitting_steps(job(360, 3, 3000), 50.0, 120.0) == LEAST_STEPS
    assert fitting_steps(job(120, 3, 3000), 50.0, 120.0) is None


@pytest.mark.parametrize("model", CASES)
def test_a_models_manifests_belong_together(model: str) -> None:
    case = CASES[model]
    bodies = (yaml.safe_load((EXAMPLES / name).read_text()) for name in (case.endpoint_file, case.job_file))
    endpoint, job = InferenceEndpoint.model_validate(next(bodies)), FinetuneJob.model_validate(next(bodies))
    assert (endpoint.metadata.name, job.spec.endpoint_ref.name, job.metadata.name) == (model, model, JOB)
