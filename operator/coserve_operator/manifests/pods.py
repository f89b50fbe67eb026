"""What agents' and feeders' pods have in common: who they run as, what they may touch, and which volumes they see."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.pods import FeederTemplate, PodTemplate
from coserve_api.quantities import quantity
from coserve_api.uris import ARTIFACTS_ROOT, DATA_ROOT, MODELS_ROOT, parse_uri
from coserve_operator.manifests.metadata import secret_name, service_account_name
from coserve_operator.tenants import RedisAccess

USER = 65532
TMP = "coserve-tmp"
GPU_VENDORS = ("nvidia.com", "amd.com")
"""Whose devices torch calls cuda; a resource of theirs is a GPU or a slice of one (nvidia.com/mig-1g.10gb)."""

POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True, slots=True)
class ClaimMount:
    """A claim at a path of the container."""

    claim: str
    path: str
    read_only: bool


def model_mount(uri: str) -> ClaimMount | None:
    """Return where the model's claim goes; None for a file URI, which the template's volumes serve."""
    claim = parse_uri(uri).claim
    return None if claim is None else ClaimMount(claim, f"{MODELS_ROOT}/{claim}", read_only=True)


def dataset_mount(uri: str) -> ClaimMount | None:
    """Return where the data set's claim goes."""
    claim = parse_uri(uri).claim
    return None if claim is None else ClaimMount(claim, f"{DATA_ROOT}/{claim}", read_only=True)


def artifacts_mount(uri: str) -> ClaimMount | None:
    """Return where the artifact store's claim goes."""
    claim = parse_uri(uri).claim
    return None if claim is None else ClaimMount(claim, ARTIFACTS_ROOT, read_only=False)


def artifact_claims(endpoint: InferenceEndpoint) -> frozenset[str]:
    """Return the claims that hold the artifact store, also where the template mounts it for a file URI."""
    place = parse_uri(endpoint.spec.artifact_store.uri)
    if place.claim is not None:
        return frozenset({place.claim})
    template = endpoint.spec.template
    mounted = {mount.name for mount in template.volume_mounts if _overlap(mount.mount_path, place.path)}
    claims = (one.persistent_volume_claim for one in template.volumes if one.name in mounted)
    return frozenset(one.claim_name for one in claims if one is not None)


def model_volumes(endpoint: InferenceEndpoint) -> FeederTemplate:
    """Return the part of the template that holds the model of a file URI, read-only; nothing for another."""
    place, template = parse_uri(endpoint.spec.model.uri), endpoint.spec.template
    if place.claim is not None:
        return FeederTemplate()
    mounts = [one for one in template.volume_mounts if _overlap(one.mount_path, place.path)]
    names = {one.name for one in mounts}
    return FeederTemplate(
        volumes=tuple(one for one in template.volumes if one.name in names),
        volume_mounts=tuple(one.model_copy(update={"read_only": True}) for one in mounts),
    )


def _overlap(one: str, other: str) -> bool:
    """Return whether one of two folders lies in the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def environment(values: dict[str, str | int]) -> list[dict[str, Any]]:
    """Return the settings as the container's variables, with our prefix. Kubernetes would put other variables in the
    place of $(NAME), and one $ in that of two: a $ is written twice.
    """
    return [{"name": f"COSERVE_{name}", "value": str(value).replace("$", "$$")} for name, value in values.items()]


def redis_environment(endpoint: str, access: RedisAccess) -> list[dict[str, Any]]:
    """Return how the pod reaches Redis: as the endpoint's own user."""

    def from_secret(name: str, key: str) -> dict[str, Any]:
        return {
            "name": f"COSERVE_REDIS_{name}",
            "valueFrom": {"secretKeyRef": {"name": secret_name(endpoint, access), "key": key}},
        }

    url = {"name": "COSERVE_REDIS_URL", "value": access.url}
    ca = [from_secret("CA", "ca.crt")] if access.ca else []
    return [url, from_secret("USERNAME", "username"), from_secret("PASSWORD", "password"), *ca]


def pod_spec(
    endpoint: InferenceEndpoint,
    container: dict[str, Any],
    mounts: Iterable[ClaimMount | None],
    resources: dict[str, Any],
    *templates: PodTemplate | FeederTemplate,
) -> dict[str, Any]:
    """Return a restricted pod with `container` merged with `templates`, in the place of the endpoint's template."""
    template = endpoint.spec.template
    claims = list(dict.fromkeys(mount for mount in mounts if mount is not None))
    # Server-side apply takes no variable twice. An object that is older than the rule against it may have its own.
    own_home = any(one.name == "HOME" for each in templates for one in each.env)
    home = [] if own_home else [{"name": "HOME", "value": "/tmp"}]
    merged = container | {
        "env": [*home, *container["env"], *_dumped(templates, "env")],
        "resources": resources,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": TMP, "mountPath": "/tmp"},
            *({"name": _volume(each.claim), "mountPath": each.path, "readOnly": each.read_only} for each in claims),
            *_dumped(templates, "volume_mounts"),
        ],
    }
    spec: dict[str, Any] = {
        "serviceAccountName": service_account_name(endpoint.metadata.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "containers": [merged],
        "volumes": [{"name": TMP, "emptyDir": {}}, *_claim_volumes(claims), *_dumped(templates, "volumes")],
    }
    if template.node_selector:
        spec["nodeSelector"] = dict(template.node_selector)
    if template.tolerations:
        spec["tolerations"] = _dumped([template], "tolerations")
    return spec


def template_resources(template: PodTemplate) -> dict[str, Any]:
    """Return the template's compute resources as the API server takes them."""
    dumped: dict[str, Any] = template.resources.model_dump(mode="json", by_alias=True)
    return {name: value for name, value in dumped.items() if value}


def gpu_resource(template: PodTemplate) -> str:
    """Return the resource by which the pod gets a GPU; "" where it asks for none."""
    for resources in (template.resources.limits, template.resources.requests):
        for name, count in resources.items():
            if name.partition("/")[0] in GPU_VENDORS and quantity(count) > 0:
                return name
    return ""


def _dumped(templates: Iterable[PodTemplate | FeederTemplate], field: str) -> list[dict[str, Any]]:
    dumped = (one.model_dump(mode="json", include={field}, exclude_none=True, by_alias=True) for one in templates)
    return [part for each in dumped for part in next(iter(each.values()))]


def _volume(claim: str) -> str:
    return "coserve-" + hashlib.sha256(claim.encode()).hexdigest()[:12]


def _claim_volumes(mounts: list[ClaimMount]) -> list[dict[str, Any]]:
    """Return one volume a claim, since a pod that names a claim twice may never start."""
    writable = {mount.claim for mount in mounts if not mount.read_only}
    claims = dict.fromkeys(mount.claim for mount in mounts)
    return [
        {"name": _volume(claim), "persistentVolumeClaim": {"claimName": claim, "readOnly": claim not in writable}}
        for claim in claims
    ]
