"""A job keeps the template variables of its endpoint with which its rows were rendered, whatever becomes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coserve_api.job import FinetuneJob
from coserve_contract.messages import Desired
from coserve_contract.store import JobRecord
from coserve_operator.decide.actions import FeederAction
from coserve_operator.decide.binding import binding_of
from coserve_operator.manifests.feeder import feeder, inputs_digest
from coserve_operator.tenants import RedisAccess

BEFORE = {"enable_thinking": False, "half": 0.5, "nothing": None, "deep": {"list": [1, None], "é": ""}}
AFTER = [{"enable_thinking": True}, {}, {**BEFORE, "more": 1}]


def endpoint(make: Any, variables: dict[str, Any]) -> Any:
    return make.endpoint(engine={"templateVariables": variables})


def stored(it: Any) -> FinetuneJob:
    """The job as the API server gives it back."""
    return FinetuneJob.from_dict(json.loads(json.dumps(it.body)))


def fed(it: Any, make: Any, variables: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a feeder, and an agent, are told of a job when the endpoint has these variables: inputs, and variables."""
    job, where = stored(it), endpoint(make, variables)
    told = binding_of(job, where, 1, Desired.RUN, 1, 0, JobRecord()).spec.template_variables
    made = feeder(job, where, "image", RedisAccess("redis://r:6379/0", "u", "p"))
    (container,) = made["spec"]["template"]["spec"]["containers"]
    (given,) = (one["value"] for one in container["env"] if one["name"] == "COSERVE_TEMPLATE_VARIABLES")
    assert json.loads(given) == told
    return inputs_digest(job, where), told


@pytest.mark.parametrize("after", AFTER, ids=range(len(AFTER)))
def test_a_fed_job_does_not_see_the_endpoints_later_variables(it, make, after: dict[str, Any]) -> None:
    it.body["spec"]["dataset"]["templateVariables"] = {"own": 1}
    it.endpoint = endpoint(make, BEFORE)
    decision = it.judge()
    assert decision.feeder is FeederAction.RUN
    first = fed(it, make, BEFORE)
    assert fed(it, make, after) != first, "negative control: nothing is kept yet"
    it.write(decision)
    assert fed(it, make, BEFORE) == first
    assert fed(it, make, after) == first == (first[0], {**BEFORE, "own": 1})
    it.endpoint = endpoint(make, after)
    it.write(it.judge())
    assert fed(it, make, after) == first
    it.bound(endpointTemplateVariables=it.body["status"]["endpointTemplateVariables"])
    assert it.judge().state == "Running"
    it.write(it.judge())
    assert fed(it, make, after) == first


def test_a_job_that_nobody_has_fed_takes_those_of_its_day(it, make) -> None:
    it.endpoint = endpoint(make, BEFORE)
    it.body["spec"]["suspend"] = True
    it.write(it.judge())
    assert "endpointTemplateVariables" not in it.body["status"]
    it.body["spec"]["suspend"] = False
    it.endpoint = endpoint(make, {"enable_thinking": True})
    it.write(it.judge())
    assert it.body["status"]["endpointTemplateVariables"] == '{"enable_thinking": true}'


def test_an_endpoint_without_variables_stays_so_for_the_job(it, make) -> None:
    it.write(it.judge())
    assert fed(it, make, BEFORE)[1] == {}


def test_a_job_of_an_older_operator_keeps_those_that_it_finds(it, make) -> None:
    it.bound()
    it.endpoint = endpoint(make, BEFORE)
    it.write(it.judge())
    assert fed(it, make, {})[1] == BEFORE


def test_variables_beyond_the_bounds_are_not_kept(it, make) -> None:
    """Their job is refused before it is fed, and one that runs, of an older operator, goes on as it was."""
    it.bound()
    it.endpoint = endpoint(make, {"x": "x" * 20_000})
    it.write(it.judge())
    assert "endpointTemplateVariables" not in it.body["status"]
