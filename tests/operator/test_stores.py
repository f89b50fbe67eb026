"""Artifact stores of endpoints that lie in one another."""

from __future__ import annotations

from typing import Any

import pytest
from live_operator import Cluster, Operator, eventually

from coserve_operator.decide.stores import overlap


def endpoint(make: Any, name: str, uri: str, made: str = "2026-11-21T11:00:00Z", namespace: str = "ml") -> Any:
    found = make.endpoint(name, f"uid-{name}", artifactStore={"uri": uri})
    more = {"creation_timestamp": made, "namespace": namespace}
    return found.model_copy(update={"metadata": found.metadata.model_copy(update=more)})


@pytest.mark.parametrize(
    ("mine", "theirs", "taken"),
    [
        ("pvc://a/x", "pvc://a/", True),
        ("pvc://a", "pvc://a/x/y", True),
        ("pvc://a/x/y", "pvc://a/x", True),
        ("pvc://a/x", "pvc://a/x/", False),
        ("pvc://a/x", "pvc://a/xy", False),
        ("pvc://a/x", "pvc://b/", False),
        ("file:///artifacts/x", "file:///artifacts", False),
    ],
)
def test_one_folder_within_another_is_refused_to_the_younger(make: Any, mine: str, theirs: str, taken: bool) -> None:
    younger, older = endpoint(make, "b", mine, "2026-11-21T11:30:00Z"), endpoint(make, "a", theirs)
    message = overlap(younger, [older, younger])
    assert bool(message) is taken
    assert not taken or ("InferenceEndpoint a" in message and theirs in message and mine in message)
    assert overlap(older, [older, younger]) == ""
    assert overlap(younger, [endpoint(make, "a", theirs, namespace="other")]) == ""


@pytest.mark.apiserver
async def test_an_endpoint_within_anothers_store_does_not_begin_until_that_one_is_gone(
    operator: Operator, cluster: Cluster, make: Any
) -> None:
    cluster.apply(make.endpoint_body())
    await eventually(lambda: cluster.get("deployment", "tiny"))
    cluster.apply(make.endpoint_body("within"), artifactStore={"uri": "pvc://artifacts/store/within"})
    found = await eventually(
        lambda: (c := cluster.condition("iep", "within", "Ready"))["reason"] == "ArtifactStoreTaken" and c
    )
    assert (found["status"], "InferenceEndpoint tiny" in found["message"]) == ("False", True)
    assert cluster.get("deployment", "within") is None
    cluster.apply(make.endpoint_body("beside"))
    await eventually(lambda: cluster.get("deployment", "beside"))
