"""What the operator says of an InferenceEndpoint."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from coserve_api.adapters import MAX_ADAPTERS, AdapterStatus
from coserve_api.common import StatusModel
from coserve_api.conditions import Condition

MAX_AGENTS = 512


class EndpointCondition(StrEnum):
    ACCEPTED = "Accepted"
    """False where this version of the operator cannot read the object."""
    READY = "Ready"
    MODEL_LOADED = "ModelLoaded"
    SLO_MET = "SLOMet"
    SCALING_READY = "ScalingReady"
    REDIS_READY = "RedisReady"
    DRIFTED = "Drifted"
    """Only where somebody else has changed fields of what the endpoint owns again and again, at some time."""
    AVAILABLE = "Available"
    """Agents serve, be they of the newest spec or of an older one."""
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    """These two are kstatus's: True only while something is under way, or cannot go on."""
    ADAPTERS_READY = "AdaptersReady"


class SloStatus(StatusModel):
    """Latency of the last minute, over all agents."""

    ttft_millis: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """P99 of the time to the first token."""
    tpot_millis: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """P99 of the time per output token."""
    attainment_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of requests that attained the promise."""


class AgentStatus(StatusModel):
    """An agent."""

    name: Annotated[str, Field(max_length=253)]
    """Its pod."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Its node."""
    device: Annotated[str, Field(max_length=253)] = ""
    """What its engine computes on; empty while it loads."""
    jobs: Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(max_length=64)] = ()
    """Names of the FinetuneJobs it runs."""


class EndpointStatus(StatusModel):
    """What the endpoint is."""

    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The metadata.generation this status is based on."""
    replicas: Annotated[int, Field(ge=0)] = 0
    """Agents that exist."""
    ready_replicas: Annotated[int, Field(ge=0)] = 0
    """Agents that serve."""
    selector: Annotated[str, Field(max_length=512)] = ""
    """Label selector of the agents' pods, for the autoscaler."""
    url: Annotated[str, Field(max_length=512)] | None = None
    """Base URL of the OpenAI API inside the cluster, without /v1."""
    saturation_percent: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """How much of the promise inference alone would use up, averaged over the ready agents."""
    slo: SloStatus | None = None
    """Measured latency."""
    adapters: Annotated[
        tuple[AdapterStatus, ...],
        Field(
            max_length=MAX_ADAPTERS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
    """Published adapters."""
    agents: Annotated[
        tuple[AgentStatus, ...],
        Field(
            max_length=MAX_AGENTS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
    """Live agents."""
    jobs: Annotated[int, Field(ge=0)] = 0
    """FinetuneJobs bound to an agent of this endpoint."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = ()
    """Accepted, Ready, Available, Reconciling, Stalled, ModelLoaded, SLOMet, ScalingReady, RedisReady, AdaptersReady;
    Drifted where it was True once."""
