"""What the platform gives agents' and feeders' pods, under what an endpoint's own template says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from coserve_operator.manifests import agents
from coserve_operator.manifests.defaults import with_pod_defaults
from coserve_operator.manifests.feeder import feeder
from coserve_operator.settings import NO_DEFAULTS, PodDefaults
from coserve_operator.tenants import RedisAccess

DEFAULTS = PodDefaults.model_validate(
    {
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "gpu",
        "runtimeClassName": "nvidia",
        "labels": {"team": "ml", "coserve.dev/endpoint": "another"},
        "annotations": {"example.com/a": "b"},
        "nodeSelector": {"pool": "gpu", "zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "own", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
            {"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}},
        ],
    }
)
TEMPLATE = {"nodeSelector": {"zone": "b"}, "tolerations": [{"key": "own", "operator": "Exists"}]}
REDIS = RedisAccess("redis://r:6379/0", "u", "p")


def deployment(make: Any, defaults: PodDefaults = NO_DEFAULTS, **spec: Any) -> Any:
    return agents.deployment(make.endpoint(**spec), 2, "agent:1", REDIS, None, defaults)


def test_without_defaults_nothing_changes(make) -> None:
    for spec in ({}, {"template": TEMPLATE}):
        made = deployment(make, **spec)
        assert with_pod_defaults(made, NO_DEFAULTS, spread=True) == made


def test_the_endpoints_template_comes_first_and_what_selects_stays(make) -> None:
    made = deployment(make, template=TEMPLATE)
    template = deployment(make, DEFAULTS, template=TEMPLATE)["spec"]["template"]
    pod, before = template["spec"], made["spec"]["template"]
    assert pod["nodeSelector"] == {"pool": "gpu", "zone": "b"}
    assert pod["tolerations"] == [{"key": "own", "operator": "Exists"}, {"key": "gpu", "operator": "Exists"}]
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("gpu", "nvidia")
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert template["metadata"]["labels"] == {"team": "ml"} | before["metadata"]["labels"]
    assert template["metadata"]["annotations"] == {"example.com/a": "b"}
    zone, rack = pod["topologySpreadConstraints"]
    assert zone["labelSelector"] == {"matchLabels": before["metadata"]["labels"]}
    assert rack["labelSelector"] == {}
    assert made["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_a_feeder_has_them_too_but_is_alone(make) -> None:
    made = feeder(make.job(), make.endpoint(), "agent:1", REDIS)
    pod = with_pod_defaults(made, DEFAULTS)["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "gpu"
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert "topologySpreadConstraints" not in pod


def test_agents_of_all_endpoints_take_new_defaults_in_turns() -> None:
    assert agents.builder("agent:1", REDIS, DEFAULTS) != agents.builder("agent:1", REDIS)


def test_a_default_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValidationError, match="nodeSelektor"):
        PodDefaults.model_validate({"nodeSelektor": {}})
