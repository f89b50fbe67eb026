"""Names, labels and owner references of everything the operator makes, in one place."""

import hashlib
import json
from typing import Any

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, Kind, Manifest
from coserve_operator.tenants import RedisAccess

APP, ENDPOINT_LABEL = "app.kubernetes.io/name", "coserve.dev/endpoint"
JOB_LABEL, JOB_UID_LABEL = "coserve.dev/job", "coserve.dev/job-uid"
MANAGED_BY = {"app.kubernetes.io/managed-by": "coserve-operator"}
AGENT_APP, FEEDER_APP = "coserve-agent", "coserve-feeder"
MADE_FROM, BUILDER, JOBS = "coserve.dev/made-from", "coserve.dev/builder", "coserve.dev/jobs"
"""Annotations of a Deployment: digests of its pods' template but for the jobs that they are started for, and of how
this operator builds one; and these jobs.
"""
IN_TURN = "coserve.dev/in-turn"
"""Annotation of a Deployment whose agents were replaced for a new version of ours."""
LEAVING = "coserve.dev/leaving-since"
"""Annotation of a pod that the operator chose to remove: when, in seconds of the epoch. It outlives the operator."""
TEMPLATE = "coserve.dev/template"
"""Annotation of a pod: digest of the template that it was made from."""
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
LONGEST_LABEL = 63


def agent_labels(endpoint: str) -> dict[str, str]:
    """Return the labels that select exactly the agents' pods of an endpoint."""
    return {APP: AGENT_APP, ENDPOINT_LABEL: endpoint}


def selector(endpoint: str) -> str:
    """Return `agent_labels` as /scale wants them."""
    return ",".join(f"{key}={value}" for key, value in sorted(agent_labels(endpoint).items()))


def short_name(name: str, suffix: str) -> str:
    """Return NAME-suffix; a name too long for a label is cut and told apart by a digest."""
    whole = f"{name}-{suffix}"
    if len(whole) <= LONGEST_LABEL:
        return whole
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_LABEL - len(suffix) - len(digest) - 2].rstrip('-.')}-{digest}-{suffix}"


def secret_name(endpoint: str, access: RedisAccess) -> str:
    """Return the name of the Secret with the endpoint's Redis user and password: of other content, another one."""
    return short_name(endpoint, f"redis-{access.digest}")


def service_account_name(endpoint: str) -> str:
    """Return the name of the pods' ServiceAccount, which has no rights."""
    return short_name(endpoint, "agent")


def owner(parent: InferenceEndpoint | FinetuneJob) -> dict[str, Any]:
    """Return the owner reference by which the garbage collector deletes what `parent` owned."""
    kind = ENDPOINT if isinstance(parent, InferenceEndpoint) else FINETUNE_JOB
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "name": parent.metadata.name,
        "uid": parent.metadata.uid,
        "controller": True,
    }


def manifest(
    kind: Kind,
    name: str,
    parent: InferenceEndpoint | FinetuneJob,
    labels: dict[str, str],
    annotations: dict[str, str] | None = None,
    **body: Any,
) -> Manifest:
    """Return an object of `kind` that `parent` owns; `body` holds spec, data and the like."""
    built: Manifest = {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {
            "name": name,
            "namespace": parent.metadata.namespace,
            "labels": MANAGED_BY | labels,
            "ownerReferences": [owner(parent)],
        },
        **body,
    }
    if annotations:
        built["metadata"]["annotations"] = annotations
    return built


def digest_of(value: object) -> str:
    """Return a short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stamp(deployment: Manifest) -> str:
    """Write the digest of a Deployment's template into it, and return it: its pods tell what they were made from."""
    template = deployment["spec"]["template"]
    digest = digest_of(template)
    template["metadata"].setdefault("annotations", {})[TEMPLATE] = digest
    return digest


def is_leaving(observed: Manifest) -> bool:
    """Return whether the object goes by itself: it is being deleted, or was made for an owner of ours that is gone."""
    references = observed["metadata"].get("ownerReferences") or []
    ours = any(each.get("controller") and each.get("kind") in (ENDPOINT.name, FINETUNE_JOB.name) for each in references)
    return ours or observed["metadata"].get("deletionTimestamp") is not None


def is_owned_by(observed: Manifest, uid: str) -> bool:
    """Return whether the object's controller is the one with this uid."""
    references = observed["metadata"].get("ownerReferences") or []
    return any(reference.get("uid") == uid and reference.get("controller") for reference in references)
