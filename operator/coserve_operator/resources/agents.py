"""The Deployment of an endpoint's agents."""

import json
from typing import Any

from coserve_api.common import duration_ms, quantity_bytes
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.uris import artifacts_path, model_path
from coserve_operator.kube import DEPLOYMENT, Manifest
from coserve_operator.resources import pods
from coserve_operator.resources.metadata import agent_labels, manifest

HTTP_PORT, ADMIN_PORT = 8000, 8001
GRACE_S, PRE_STOP_S = 60, 3
START_S = 1800


def deployment(
    endpoint: InferenceEndpoint, replicas: int, default_image: str, redis_url: str, password_digest: str
) -> Manifest:
    """Return the agents; `password_digest` makes a new password a new rollout.

    A roll-out takes an agent away before it adds one, since a spare GPU cannot be assumed.
    """
    spec, labels = endpoint.spec, agent_labels(endpoint.metadata.name)
    container: dict[str, Any] = {
        "name": "agent",
        "image": spec.image or default_image,
        "command": ["python3", "-m", "coserve_agent.main"],
        "env": _environment(endpoint, redis_url),
        "ports": [{"name": "http", "containerPort": HTTP_PORT}, {"name": "admin", "containerPort": ADMIN_PORT}],
        "startupProbe": _probe("/health", period_s=2, failures=START_S // 2),
        "livenessProbe": _probe("/health", period_s=10, failures=6),
        "readinessProbe": _probe("/ready", period_s=2, failures=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
    }
    mounts = (pods.model_mount(spec.model.uri), pods.artifacts_mount(spec.artifact_store.uri))
    pod = pods.pod_spec(endpoint, container, mounts, pods.template_resources(spec.template))
    pod["terminationGracePeriodSeconds"] = GRACE_S
    pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels},
        }
    ]
    annotations = {"coserve.dev/redis-password": password_digest}
    return manifest(
        DEPLOYMENT,
        endpoint.metadata.name,
        endpoint,
        labels,
        spec={
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": START_S + 60,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
        },
    )


def _environment(endpoint: InferenceEndpoint, redis_url: str) -> list[dict[str, Any]]:
    spec, meta = endpoint.spec, endpoint.metadata
    slowdown, kept = spec.finetuning.max_slowdown_percent, spec.finetuning.activation_memory
    cache = spec.engine.kv_cache_memory
    by_device = {
        "MAX_REQUESTS": spec.engine.max_requests,
        "MAX_BATCH_TOKENS": spec.engine.max_batch_tokens,
        "KV_CACHE_BYTES": None if cache is None else quantity_bytes(cache),
    }
    settings: dict[str, str | int] = {
        "ENDPOINT_UID": meta.uid,
        "ENDPOINT_NAME": meta.name,
        "NAMESPACE": meta.namespace,
        "MODEL_PATH": model_path(spec.model.uri),
        "MODEL_URI": spec.model.uri,
        "MODEL_NAME": endpoint.model_name,
        "MAX_MODEL_LENGTH": spec.model.max_model_length,
        "TTFT_MS": duration_ms(spec.slo.time_to_first_token),
        "TPOT_MS": duration_ms(spec.slo.time_per_output_token),
        "SLO_PERCENTILE": spec.slo.percentile,
        "FINETUNING": spec.finetuning.policy.value,
        "MAX_RANK": spec.finetuning.max_rank,
        "MAX_CONCURRENT_JOBS": spec.finetuning.max_concurrent_jobs,
        "MAX_SLOWDOWN_PERCENT": "" if slowdown is None else slowdown,
        "PASS_BYTES": "" if kept is None else quantity_bytes(kept),
        "DEVICE": spec.engine.device.value,
        "GPU_RESOURCE": pods.gpu_resource(spec.template),
        "DTYPE": spec.engine.dtype.value,
        "THREADS": spec.engine.threads,
        "GENERATION_CONFIG": spec.engine.generation_config.value,
        "TEMPLATE_VARIABLES": json.dumps(spec.engine.template_variables, sort_keys=True),
        "CORS_ORIGINS": ",".join(spec.cors.allow_origins),
        "ARTIFACTS": artifacts_path(spec.artifact_store.uri),
        "HTTP_PORT": HTTP_PORT,
        "ADMIN_PORT": ADMIN_PORT,
        # What is unset is left out: an older agent's image has defaults of its own, and takes no blank.
        **{name: value for name, value in by_device.items() if value is not None},
    }
    downward = {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "NODE_NAME": "spec.nodeName"}
    fields = [
        {"name": f"COSERVE_{name}", "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in downward.items()
    ]
    return [*pods.environment(settings), *fields, *pods.redis_environment(meta.name, redis_url)]


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "admin"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
