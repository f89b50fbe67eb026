"""What an endpoint owns beside its agents' Deployment: the way in, the way to scale, and what keeps it apart."""

from urllib.parse import urlsplit

from coserve_api.common import API_VERSION, duration_ms
from coserve_api.endpoint import InferenceEndpoint
from coserve_operator.kube import (
    AUTOSCALER,
    DISRUPTION_BUDGET,
    NETWORK_POLICY,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Manifest,
)
from coserve_operator.manifests.agents import ADMIN_PORT, HTTP_PORT
from coserve_operator.manifests.metadata import (
    ENDPOINT_LABEL,
    agent_labels,
    manifest,
    secret_name,
    service_account_name,
)
from coserve_operator.tenants import RedisAccess

METRIC = "slo_saturation_percent"
METRICS_LABEL = "coserve.dev/metrics"
"""Namespaces that carry it with the value "true" may scrape the agents."""


def url(endpoint: InferenceEndpoint) -> str:
    """Return the base URL inside the cluster."""
    return f"http://{endpoint.metadata.name}.{endpoint.metadata.namespace}.svc"


def service(endpoint: InferenceEndpoint) -> Manifest:
    """Return the Service in front of the ready agents."""
    labels = agent_labels(endpoint.metadata.name)
    ports = [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    return manifest(
        SERVICE,
        endpoint.metadata.name,
        endpoint,
        labels,
        spec={"type": "ClusterIP", "selector": labels, "ports": ports},
    )


def service_account(endpoint: InferenceEndpoint) -> Manifest:
    """Return the pods' account, which has neither rights nor a token."""
    name = service_account_name(endpoint.metadata.name)
    labels = agent_labels(endpoint.metadata.name)
    return manifest(SERVICE_ACCOUNT, name, endpoint, labels, automountServiceAccountToken=False)


def redis_secret(endpoint: InferenceEndpoint, access: RedisAccess) -> Manifest:
    """Return the endpoint's own Redis user. It never changes: what does is another Secret."""
    name, labels = secret_name(endpoint.metadata.name, access), agent_labels(endpoint.metadata.name)
    data = {"username": access.username, "password": access.password}
    data |= {"ca.crt": access.ca} if access.ca else {}
    return manifest(SECRET, name, endpoint, labels, immutable=True, type="Opaque", stringData=data)


def disruption_budget(endpoint: InferenceEndpoint) -> Manifest:
    """Return the budget that lets a drain take one agent at a time, and a broken one always."""
    labels = agent_labels(endpoint.metadata.name)
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": labels},
    }
    return manifest(DISRUPTION_BUDGET, endpoint.metadata.name, endpoint, labels, spec=spec)


def autoscaler(endpoint: InferenceEndpoint) -> Manifest | None:
    """Return the HPA on the endpoint's own /scale, or None without `spec.autoscaling`."""
    scaling = endpoint.spec.autoscaling
    if scaling is None:
        return None
    name = endpoint.metadata.name
    reference = {"apiVersion": API_VERSION, "kind": "InferenceEndpoint", "name": name}
    metric = {
        "type": "Object",
        "object": {
            "describedObject": reference,
            "metric": {"name": METRIC},
            "target": {"type": "Value", "value": str(scaling.target_saturation_percent)},
        },
    }
    behavior = {
        direction: {"stabilizationWindowSeconds": duration_ms(rule.stabilization_window) // 1000}
        for direction, rule in (("scaleUp", scaling.behavior.scale_up), ("scaleDown", scaling.behavior.scale_down))
    }
    spec = {
        "scaleTargetRef": reference,
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas,
        "metrics": [metric],
        "behavior": behavior,
    }
    return manifest(AUTOSCALER, name, endpoint, agent_labels(name), spec=spec)


def network_policy(endpoint: InferenceEndpoint, operator_namespace: str, redis_url: str) -> Manifest:
    """Return what agents and feeders may do: serve HTTP, be scraped, resolve names, reach Redis; nothing else."""
    name = endpoint.metadata.name
    scrapers = [
        {"namespaceSelector": {"matchLabels": {METRICS_LABEL: "true"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": operator_namespace}}},
    ]
    redis_port = urlsplit(redis_url).port or 6379
    spec = {
        "podSelector": {"matchLabels": {ENDPOINT_LABEL: name}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"ports": [{"port": HTTP_PORT, "protocol": "TCP"}]},
            {"ports": [{"port": ADMIN_PORT, "protocol": "TCP"}], "from": scrapers},
        ],
        "egress": [
            {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
            {"ports": [{"port": redis_port, "protocol": "TCP"}]},
        ],
    }
    return manifest(NETWORK_POLICY, name, endpoint, agent_labels(name), spec=spec)
