"""What somebody changes is looked at first, then what happens by itself, and then the thousands that are listed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, POD, Kube, Manifest
from coserve_operator.main import Operator
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.telemetry import Telemetry
from coserve_operator.tls import RedisTls

COUNT = 200


class Leads:
    def token(self) -> int:
        return 1


@pytest.fixture
def operator(make: Any) -> Operator:
    """One that was started beside so many endpoints, and has looked at none yet."""
    settings = Settings(metrics_api_service="")
    stores = Stores(settings, Leads(), time.monotonic, RedisTls())  # type: ignore[arg-type]
    made = Operator(settings, Kube(None), stores, Telemetry(time.monotonic), RedisTls())  # type: ignore[arg-type]
    for number in range(COUNT):
        made.on_event(ENDPOINT, None, endpoint(make, number))
    return made


def endpoint(make: Any, number: int, version: int = 1, **metadata: Any) -> Manifest:
    body: Manifest = make.endpoint_body(f"end-{number}", f"e-{number}")
    body["metadata"] |= {"resourceVersion": str(version), "generation": 1, **metadata}
    body["status"] = {"observedGeneration": 1}
    return body


def first(operator: Operator) -> str | None:
    found = operator.queue._schedule.pop(time.monotonic())
    return None if found is None else found[1]


def test_what_is_listed_comes_in_the_order_of_the_list(operator: Operator) -> None:
    assert [first(operator) for _ in range(3)] == ["end-0", "end-1", "end-2"]


@pytest.mark.parametrize(
    ("type_", "change"),
    [("MODIFIED", {"generation": 2}), ("MODIFIED", {"deletionTimestamp": "2026-12-01T00:00:00Z"}), ("DELETED", {})],
)
def test_what_is_asked_for_comes_first(operator: Operator, make: Any, type_: str, change: dict[str, Any]) -> None:
    operator.on_event(ENDPOINT, type_, endpoint(make, 150, version=9, **change))
    assert [first(operator) for _ in range(2)] == ["end-150", "end-0"]


def test_a_new_job_comes_first(operator: Operator, make: Any) -> None:
    operator.on_event(FINETUNE_JOB, "ADDED", make.job_body(endpointRef={"name": "end-120"}))
    assert first(operator) == "end-120"


def test_what_happens_by_itself_comes_before_what_is_listed_and_behind_what_is_asked_for(
    operator: Operator, make: Any
) -> None:
    operator.on_event(ENDPOINT, "MODIFIED", endpoint(make, 150, version=9))  # of a status
    labels = {"app.kubernetes.io/name": "coserve-agent", "coserve.dev/endpoint": "end-160"}
    meta = {"namespace": make.NAMESPACE, "name": "p", "uid": "p", "resourceVersion": "10", "labels": labels}
    operator.on_event(POD, "ADDED", {"metadata": meta, "spec": {}, "status": {}})
    operator.on_event(ENDPOINT, "MODIFIED", endpoint(make, 170, version=11, generation=2))
    assert [first(operator) for _ in range(4)] == ["end-170", "end-150", "end-160", "end-0"]
