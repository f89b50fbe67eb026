"""The Deployment of an endpoint's agents."""

import json
from typing import Any

from coserve_api.common import duration_ms
from coserve_api.endpoint import FinetuningPolicy, InferenceEndpoint
from coserve_api.quantities import quantity_bytes
from coserve_api.uris import artifacts_path, model_path
from coserve_operator.kube import DEPLOYMENT, Manifest
from coserve_operator.manifests import pods
from coserve_operator.manifests.defaults import with_pod_defaults
from coserve_operator.manifests.metadata import agent_labels, digest_of, manifest
from coserve_operator.settings import NO_DEFAULTS, PodDefaults
from coserve_operator.tenants import RedisAccess

HTTP_PORT, ADMIN_PORT = 8000, 8001
GRACE_S, PRE_STOP_S = 60, 3
START_S = 1800


def deployment(
    endpoint: InferenceEndpoint,
    replicas: int,
    default_image: str,
    access: RedisAccess,
    jobs: int | None = None,
    defaults: PodDefaults = NO_DEFAULTS,
    least_rank: int = 0,
) -> Manifest:
    """Return the agents, started for `jobs` jobs at once, else for as many as the endpoint allows;
    `defaults` are the platform's; `least_rank` is what agents must have room for, whatever spec.finetuning.maxRank is
    by now.
    """
    spec, labels = endpoint.spec, agent_labels(endpoint.metadata.name)
    container: dict[str, Any] = {
        "name": "agent",
        "image": spec.image or default_image,
        "command": ["python3", "-m", "coserve_agent.main"],
        "env": _environment(endpoint, access, spec.finetuning.jobs if jobs is None else jobs, least_rank),
        "ports": [{"name": "http", "containerPort": HTTP_PORT}, {"name": "admin", "containerPort": ADMIN_PORT}],
        "startupProbe": _probe("/health", period_s=2, failures=START_S // 2),
        "livenessProbe": _probe("/health", period_s=10, failures=6),
        "readinessProbe": _probe("/ready", period_s=2, failures=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
    }
    mounts = (pods.model_mount(spec.model.uri), pods.artifacts_mount(spec.artifact_store.uri))
    pod = pods.pod_spec(endpoint, container, mounts, pods.template_resources(spec.template), spec.template)
    pod["terminationGracePeriodSeconds"] = GRACE_S
    pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels},
        }
    ]
    rolling = {"maxSurge": spec.rollout.max_surge, "maxUnavailable": spec.rollout.max_unavailable}
    made = manifest(
        DEPLOYMENT,
        endpoint.metadata.name,
        endpoint,
        labels,
        spec={
            "replicas": replicas,
            "paused": False,  # ours, so that a pause of somebody else's is taken back: nothing would be replaced
            "selector": {"matchLabels": labels},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": START_S + 60,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    )
    return with_pod_defaults(made, defaults, spread=True)


def builder(default_image: str, access: RedisAccess, defaults: PodDefaults = NO_DEFAULTS) -> str:
    """Return a digest of how agents are made of an endpoint: another version of the operator, or other settings of it,
    have another. `access` is of an endpoint that never was.
    """
    made = [deployment(each, 0, default_image, access, 1, defaults) for each in _REFERENCES]
    return digest_of(made)


def _reference(**spec: Any) -> InferenceEndpoint:
    needed = {"model": {"uri": "pvc://models/m"}, "artifactStore": {"uri": "pvc://artifacts/a"}}
    return InferenceEndpoint.from_dict({"metadata": {"name": "reference", "uid": "r"}, "spec": needed | spec})


_REFERENCES = (
    _reference(),
    _reference(
        template={"resources": {"limits": {"nvidia.com/gpu": "1"}}},
        finetuning={"activationMemory": "1Gi"},
        engine={"maxRequests": 1, "maxBatchTokens": 512, "kvCacheMemory": "1Gi"},
        cors={"allowOrigins": ["*"]},
    ),
)


def _environment(endpoint: InferenceEndpoint, access: RedisAccess, jobs: int, least_rank: int) -> list[dict[str, Any]]:
    spec, meta = endpoint.spec, endpoint.metadata
    kept, cache = spec.finetuning.activation_memory, spec.engine.kv_cache_memory
    parser = spec.engine.tool_call_parser
    optional = {
        "MAX_REQUESTS": spec.engine.max_requests,
        "MAX_BATCH_TOKENS": spec.engine.max_batch_tokens,
        "KV_CACHE_BYTES": None if cache is None else quantity_bytes(cache),
        "TOOL_CALL_PARSER": None if parser is None else parser.value,
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
        "FINETUNING": (FinetuningPolicy.ALLOWED if jobs else FinetuningPolicy.DISABLED).value,
        "MAX_RANK": max(spec.finetuning.max_rank, least_rank),
        "MAX_CONCURRENT_JOBS": max(1, jobs),
        "PASS_BYTES": "" if kept is None else quantity_bytes(kept),
        "DEVICE": spec.engine.device.value,
        "GPU_RESOURCE": pods.gpu_resource(spec.template),
        "DTYPE": spec.engine.dtype.value,
        "NUMERICS_MODE": spec.engine.numerics_mode.value,
        "KERNEL_FALLBACK": spec.engine.kernel_fallback.value,
        "THREADS": spec.engine.threads,
        "GENERATION_CONFIG": spec.engine.generation_config.value,
        "TEMPLATE_VARIABLES": json.dumps(spec.engine.template_variables, sort_keys=True),
        "CORS_ORIGINS": ",".join(spec.cors.allow_origins),
        "ARTIFACTS": artifacts_path(spec.artifact_store.uri),
        "HTTP_PORT": HTTP_PORT,
        "ADMIN_PORT": ADMIN_PORT,
        # What is unset is left out: an older agent's image has defaults of its own, and takes no blank.
        **{name: value for name, value in optional.items() if value is not None},
    }
    downward = {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "NODE_NAME": "spec.nodeName"}
    fields = [
        {"name": f"COSERVE_{name}", "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in downward.items()
    ]
    return [*pods.environment(settings), *fields, *pods.redis_environment(meta.name, access)]


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "admin"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
