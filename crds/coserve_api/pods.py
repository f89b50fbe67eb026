"""The part of a pod's template that an endpoint's author may set.

Only kinds of volume that stay inside the namespace can be named here: whoever may create an endpoint gets no host path
through the operator.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from coserve_api.common import LABEL_PATTERN, Label, SpecModel, Subdomain, Text
from coserve_api.quantities import ResourceQuantity
from coserve_api.uris import DATA_ROOT

Key = Annotated[str, Field(min_length=1, max_length=317)]
Name253 = Annotated[str, Field(min_length=1, max_length=253)]
ResourceList = Annotated[dict[str, ResourceQuantity], Field(max_length=16)]


def _exactly_one(*fields: str) -> dict[str, Any]:
    names = ", ".join(fields)
    rule = "[" + ", ".join(f"has(self.{field})" for field in fields) + "].filter(x, x).size() == 1"
    return {"x-kubernetes-validations": [{"rule": rule, "message": f"set exactly one of {names}"}]}


class Resources(SpecModel):
    """Compute resources of the agent's container."""

    requests: ResourceList = Field(default_factory=dict)
    """What the scheduler reserves."""
    limits: ResourceList = Field(default_factory=dict)
    """What the container may use at most."""


class TolerationOperator(StrEnum):
    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(SpecModel):
    """A taint that the pods tolerate."""

    key: Key | None = None
    """The taint's key; absent with Exists: every taint."""
    operator: TolerationOperator = TolerationOperator.EQUAL
    """Exists or Equal."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """The taint's value."""
    effect: TaintEffect | None = None
    """The taint's effect; absent: every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """How long NoExecute is tolerated."""


class KeyRef(SpecModel):
    """A key of a Secret or ConfigMap in the endpoint's namespace."""

    name: Subdomain
    """The object's name."""
    key: Name253
    """The key in it."""


class EnvSource(SpecModel):
    """Where a variable's value comes from."""

    model_config = ConfigDict(json_schema_extra=_exactly_one("secretKeyRef", "configMapKeyRef"))

    secret_key_ref: KeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """A key of a ConfigMap."""


class EnvVar(SpecModel):
    """An environment variable of the agent."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {"rule": "!(has(self.value) && has(self.valueFrom))", "message": "set value or valueFrom, not both"},
            ]
        }
    )

    name: Annotated[
        str,
        Text(
            "[A-Za-z_][A-Za-z0-9_]*",
            128,
            "must be a variable name that does not begin with COSERVE_ and is not HOME: these the operator sets",
            "!self.startsWith('COSERVE_') && self != 'HOME'",
            lambda name: not name.startswith("COSERVE_"),
        ),
    ]
    """Its name."""
    value: Annotated[str, Text("[^\\x00]*", 4096, "must hold no NUL character")] | None = None
    """Its value."""
    value_from: EnvSource | None = None
    """Where its value comes from."""


class EmptyDir(SpecModel):
    """A scratch folder that lives as long as the pod."""

    medium: Annotated[str, Field(max_length=16)] | None = None
    """"Memory" for a tmpfs."""
    size_limit: ResourceQuantity | None = None
    """The most it may hold."""


class ConfigMapSource(SpecModel):
    """A ConfigMap of the namespace as a folder."""

    name: Subdomain
    """Its name."""


class SecretSource(SpecModel):
    """A Secret of the namespace as a folder."""

    secret_name: Subdomain
    """Its name."""


class ClaimSource(SpecModel):
    """A PersistentVolumeClaim of the namespace."""

    claim_name: Subdomain
    """Its name."""
    read_only: bool = False
    """Mount it read-only."""


class Volume(SpecModel):
    """A volume of the pods."""

    model_config = ConfigDict(
        json_schema_extra=_exactly_one("emptyDir", "configMap", "secret", "persistentVolumeClaim")
    )

    name: Annotated[
        str,
        Text(
            LABEL_PATTERN,
            63,
            "must be a DNS-1123 label of at most 63 characters that does not begin with coserve-, as the operator's do",
            "!self.startsWith('coserve-')",
        ),
    ]
    """Its name in `volumeMounts`."""
    empty_dir: EmptyDir | None = None
    """A scratch folder."""
    config_map: ConfigMapSource | None = None
    """A ConfigMap."""
    secret: SecretSource | None = None
    """A Secret."""
    persistent_volume_claim: ClaimSource | None = None
    """A PersistentVolumeClaim."""


_MOUNT_PATH = "/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*"


class VolumeMount(SpecModel):
    """Where the container sees a volume."""

    name: Label
    """The volume."""
    mount_path: Annotated[
        str,
        Text(
            _MOUNT_PATH,
            512,
            "must be an absolute path without ':', '.' or '..' and outside /tmp and /data, where the operator mounts",
            "!self.contains('..') && !(self + '/').contains('/./')"
            f" && ['/tmp/', '{DATA_ROOT}/'].all(ours, !(self + '/').startsWith(ours))",
            lambda path: ".." not in path,
        ),
    ]
    """Where."""
    sub_path: (
        Annotated[
            str,
            Text(
                _MOUNT_PATH.removeprefix("/"),
                512,
                "must be a relative path without '..'",
                "!self.contains('..')",
                lambda path: ".." not in path,
            ),
        ]
        | None
    ) = None
    """The folder of the volume to mount; absent: its root."""
    read_only: bool = False
    """Mount it read-only."""


def _map_list(key: str) -> dict[str, Any]:
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class FeederTemplate(SpecModel):
    """What the feeders' pods need besides what the operator gives them."""

    env: Annotated[tuple[EnvVar, ...], Field(max_length=64, json_schema_extra=_map_list("name"))] = ()
    """Further environment variables."""
    volumes: Annotated[tuple[Volume, ...], Field(max_length=16, json_schema_extra=_map_list("name"))] = ()
    """Further volumes."""
    volume_mounts: Annotated[
        tuple[VolumeMount, ...], Field(max_length=16, json_schema_extra=_map_list("mountPath"))
    ] = ()
    """Where the container sees them."""


class PodTemplate(SpecModel):
    """What the agents' pods need besides what the operator gives them; feeders take the place alone."""

    resources: Resources = Field(default_factory=Resources)
    """Compute resources of the agent's container."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    """Labels that a node must have."""
    tolerations: Annotated[
        tuple[Toleration, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """Taints that the pods tolerate."""
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64, json_schema_extra=_map_list("name"))] = ()
    """Further environment variables."""
    volumes: Annotated[tuple[Volume, ...], Field(max_length=16, json_schema_extra=_map_list("name"))] = ()
    """Further volumes."""
    volume_mounts: Annotated[
        tuple[VolumeMount, ...], Field(max_length=16, json_schema_extra=_map_list("mountPath"))
    ] = ()
    """Where the container sees them."""
