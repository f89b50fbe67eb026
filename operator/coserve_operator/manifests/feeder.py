"""The feeder: a Kubernetes Job that tokenises a FinetuneJob's data set into Redis."""

import json
from typing import Any

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_api.pods import FeederTemplate
from coserve_api.uris import dataset_path, dataset_root, model_path
from coserve_contract.told import feeder_settings
from coserve_operator.kube import BATCH_JOB, Manifest
from coserve_operator.manifests import pods
from coserve_operator.manifests.metadata import (
    APP,
    ENDPOINT_LABEL,
    FEEDER_APP,
    JOB_LABEL,
    JOB_UID_LABEL,
    digest_of,
    manifest,
    secret_name,
    short_name,
)
from coserve_operator.tenants import RedisAccess

INPUTS = "coserve.dev/inputs"
"""Annotation: digest of what the feeder reads. Another one needs another feeder; another image does not."""
REDIS_SECRET = "coserve.dev/redis-secret"
"""Annotation: the Secret with the Redis user that it has."""
PURPOSE, CHECK = "coserve.dev/purpose", "Check"
"""Annotation of a feeder that reads the data and ends."""
RETRIES = 6
"""Of a program that ends with an error; a pod that is taken away counts for nothing."""
TERMINATED = 143
"""How the program ends when its pod is told to go."""
RESOURCES = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}}


def template_variables(job: FinetuneJob, endpoint: InferenceEndpoint) -> dict[str, Any]:
    """Return those of the chat template that a job's rows are rendered with: what it is served with when nobody says
    otherwise. Of the endpoint's they are those of when the data were first read.
    """
    kept = job.status.endpoint_template_variables
    endpoints = endpoint.spec.engine.template_variables if kept is None else json.loads(kept)
    return {**endpoints, **job.spec.dataset.template_variables}


def feeder_name(job: str) -> str:
    """Return the name of a FinetuneJob's feeder."""
    return short_name(job, "feeder")


def inputs_digest(job: FinetuneJob, endpoint: InferenceEndpoint) -> str:
    """Return the digest of everything that decides which shards the feeder makes."""
    return digest_of(_settings(job, endpoint))


def feeder(
    job: FinetuneJob, endpoint: InferenceEndpoint, default_image: str, access: RedisAccess, check: bool = False
) -> Manifest:
    """Return the Job. It parses what a job's author chose, so it gets of the template its place alone, and the model
    where the template holds it. It pushes no shard where it is to `check`.
    """
    labels = {APP: FEEDER_APP, ENDPOINT_LABEL: endpoint.metadata.name, JOB_LABEL: job.metadata.name}
    labels[JOB_UID_LABEL] = job.metadata.uid
    container: dict[str, Any] = {
        "name": "feeder",
        "image": endpoint.spec.image or default_image,
        "command": ["python3", "-m", "coserve_agent.feeder"],
        "env": [
            *pods.environment(_settings(job, endpoint) | ({"MODE": CHECK} if check else {})),
            *pods.redis_environment(endpoint.metadata.name, access),
        ],
    }
    files = filter(None, (job.spec.dataset.uri, job.spec.evaluation.uri))
    mounts = (pods.model_mount(endpoint.spec.model.uri), *(pods.dataset_mount(uri) for uri in files))
    own = endpoint.spec.finetuning.feeder
    pod = pods.pod_spec(endpoint, container, mounts, RESOURCES, own, _beside(own, pods.model_volumes(endpoint)))
    pod["restartPolicy"] = "Never"
    annotations = {INPUTS: inputs_digest(job, endpoint), REDIS_SECRET: secret_name(endpoint.metadata.name, access)}
    return manifest(
        BATCH_JOB,
        feeder_name(job.metadata.name),
        job,
        labels,
        annotations=annotations | ({PURPOSE: CHECK} if check else {}),
        spec={
            "backoffLimit": RETRIES,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [TERMINATED]}},
                ]
            },
            "podReplacementPolicy": "Failed",
            "suspend": job.spec.suspend,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    )


def _beside(own: FeederTemplate, model: FeederTemplate) -> FeederTemplate:
    """Return what `model` has that the feeder's own template does not name itself."""
    names, paths = {one.name for one in own.volumes}, {one.mount_path for one in own.volume_mounts}
    return FeederTemplate(
        volumes=tuple(one for one in model.volumes if one.name not in names),
        volume_mounts=tuple(one for one in model.volume_mounts if one.mount_path not in paths),
    )


def _settings(job: FinetuneJob, endpoint: InferenceEndpoint) -> dict[str, str | int]:
    uris = job.spec.dataset.uri, job.spec.evaluation.uri
    settings: dict[str, str | int] = {
        "ENDPOINT_UID": endpoint.metadata.uid,
        "JOB_UID": job.metadata.uid,
        "JOB_NAME": job.metadata.name,
        "DATASET_PATH": dataset_path(uris[0]),
        "DATASET_ROOT": dataset_root(uris[0]),
        "MODEL_PATH": model_path(endpoint.spec.model.uri),
        **feeder_settings(
            job.spec,
            created=job.metadata.creation_timestamp or "",
            max_model_length=endpoint.spec.model.max_model_length,
            template_variables=template_variables(job, endpoint),
        ),
    }
    if uris[1] is not None:
        settings["EVAL_PATH"] = dataset_path(uris[1])
        settings["EVAL_ROOT"] = dataset_root(uris[1])
    return settings
