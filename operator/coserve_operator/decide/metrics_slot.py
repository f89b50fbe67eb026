"""Who serves custom.metrics.k8s.io, of which a cluster has one: the autoscalers of endpoints need it to be us."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GROUP, VERSION = "custom.metrics.k8s.io", "v1beta2"
API_SERVICES = tuple(f"{version}.{GROUP}" for version in (VERSION, "v1beta1"))
"""Names of the APIServices that are the slot; ours is the first."""
RECIPE = "remove spec.autoscaling, and scale by coserve_saturation_percent of Prometheus as docs/autoscaling.md shows"

Service = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, slots=True)
class MetricsSlot:
    """`ours` is the Service of our servers, None where there are none; `others` serve the group in their place;
    `registered`: our APIService is there; `available`: the API server reaches a server by it.
    """

    ours: Service | None = None
    others: tuple[Service, ...] = ()
    registered: bool = False
    available: bool = False

    @property
    def obstacle(self) -> tuple[str, str] | None:
        """Reason and message why no autoscaler of ours can work; None where one can, now or soon."""
        if self.others:
            holder = "/".join(self.others[0])
            return "MetricsApiTaken", f"{GROUP} of this cluster is served by {holder}: {RECIPE}"
        if self.ours is None:
            return "NoMetricsApi", f"coserve serves no {GROUP} here (metricsApi.mode is None): {RECIPE}"
        return None


def slot_of(api_services: Sequence[dict[str, Any]], ours: Service | None) -> MetricsSlot:
    """Return the slot, from those of API_SERVICES that exist."""
    others: list[Service] = []
    registered = available = False
    for each in api_services:
        service = each["spec"].get("service") or {}
        holder = (service.get("namespace", ""), service.get("name", "the API server"))
        if holder != ours:
            others.append(holder)
            continue
        registered = True
        conditions = each.get("status", {}).get("conditions") or []
        available = any(one["type"] == "Available" and one["status"] == "True" for one in conditions)
    return MetricsSlot(ours, tuple(others), registered, available)
