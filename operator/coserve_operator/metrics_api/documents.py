"""The documents of custom.metrics.k8s.io that an HPA reads: one metric of one kind of object."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from coserve_api.common import API_VERSION, timestamp
from coserve_contract.messages import Heartbeat
from coserve_operator.kube import ENDPOINT
from coserve_operator.manifests.endpoint import METRIC

GROUP_VERSION = "custom.metrics.k8s.io/v1beta2"
WINDOW_S = 15
"""Over how long an agent averages what its heartbeat says."""
Document = dict[str, Any]


def discovery() -> Document:
    """Return what can be asked for."""
    resource = {
        "name": f"{ENDPOINT.plural}.{ENDPOINT.group}/{METRIC}",
        "singularName": "",
        "namespaced": True,
        "kind": "MetricValueList",
        "verbs": ["get"],
    }
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": [resource]}


def saturation_percent(agents: Iterable[Heartbeat]) -> float | None:
    """Return the mean over the ready agents, or None when there is none: no data is not zero."""
    ready = [beat.load.saturation_percent for beat in agents if beat.ready and not beat.draining]
    return sum(ready) / len(ready) if ready else None


def value_list(namespace: str, name: str, percent: float, now: datetime) -> Document:
    """Return the metric of one endpoint."""
    described = {"kind": ENDPOINT.name, "namespace": namespace, "name": name, "apiVersion": API_VERSION}
    item = {
        "describedObject": described,
        "metric": {"name": METRIC, "selector": None},
        "timestamp": timestamp(now),
        "windowSeconds": WINDOW_S,
        "value": f"{round(percent * 1000)}m",
    }
    return {"kind": "MetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": [item]}


def failure(code: int, reason: str, message: str) -> Document:
    """Return a Status. An HPA that gets one holds the number of replicas."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
