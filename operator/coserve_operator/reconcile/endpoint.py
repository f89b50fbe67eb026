"""An InferenceEndpoint's status from its pods, heartbeats and jobs, and the events that tell of its changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from coserve_api.conditions import condition, find_condition, merge_conditions
from coserve_api.endpoint import (
    AdapterStatus,
    AgentStatus,
    EndpointCondition,
    EndpointStatus,
    InferenceEndpoint,
    SloStatus,
)
from coserve_api.messages import AdapterRecord, Heartbeat
from coserve_api.uris import artifact_uri
from coserve_operator.reconcile.observed import Notice, PodView, RedisView
from coserve_operator.resources.endpoint import url
from coserve_operator.resources.metadata import selector

Told = tuple[bool | None, str, str]
"""A condition's status, reason and message."""


@dataclass(frozen=True, slots=True)
class EndpointSight:
    """Everything that an endpoint's status is made from.

    `agent_jobs` maps agent ids to the names of the jobs bound there; `autoscaler` is what the HPA says of itself, None
    without one; `obstacle` is (reason, message) of an object that could not be applied.
    """

    endpoint: InferenceEndpoint
    pods: Sequence[PodView] = ()
    replicas: int = 0
    ready_replicas: int = 0
    redis: RedisView | None = None
    agent_jobs: Mapping[str, Sequence[str]] | None = None
    adapters: Mapping[str, AdapterRecord] | None = None
    autoscaler: Told | None = None
    obstacle: tuple[str, str] | None = None


def status_of(sight: EndpointSight, now: datetime) -> EndpointStatus:
    """Return the endpoint's status."""
    endpoint, redis = sight.endpoint, sight.redis
    old, generation = endpoint.status, endpoint.metadata.generation
    beats = redis.agents if redis is not None else {}
    serving = [beat for beat in beats.values() if beat.ready]
    told = {
        EndpointCondition.READY: _ready(sight),
        EndpointCondition.MODEL_LOADED: _model_loaded(sight, beats),
        EndpointCondition.SLO_MET: _slo_met(endpoint, serving),
        EndpointCondition.SCALING_READY: _scaling_ready(sight),
    }
    new = [condition(kind, *each, generation=generation, now=now) for kind, each in told.items()]
    jobs = sight.agent_jobs or {}
    return EndpointStatus(
        observed_generation=generation,
        replicas=sight.replicas,
        ready_replicas=sight.ready_replicas,
        selector=selector(endpoint.metadata.name),
        url=url(endpoint),
        saturation_percent=_mean([beat.load.saturation_percent for beat in serving]),
        slo=_slo(serving) if redis is not None else old.slo,
        adapters=_adapters(sight, serving) if redis is not None else old.adapters,
        agents=_agents(beats, jobs) if redis is not None else old.agents,
        jobs=sum(len(names) for names in jobs.values()) if redis is not None else old.jobs,
        conditions=merge_conditions(old.conditions, new),
    )


def notices(old: EndpointStatus, new: EndpointStatus) -> list[Notice]:
    """Return the events of a changed readiness."""
    before = find_condition(old.conditions, EndpointCondition.READY)
    after = find_condition(new.conditions, EndpointCondition.READY)
    if after is None or (before is not None and (before.status, before.reason) == (after.status, after.reason)):
        return []
    if before is None and after.reason == "AgentsStarting":
        return []
    fault = after.status != "True" and after.reason not in ("AgentsStarting", "ScaledToZero")
    return [Notice(after.reason, after.message, warning=fault)]


def _ready(sight: EndpointSight) -> Told:
    wanted, ready = sight.endpoint.spec.replicas, sight.ready_replicas
    if sight.obstacle is not None:
        return (ready > 0, *sight.obstacle)
    trouble = next((pod.trouble for pod in sight.pods if pod.trouble is not None and not pod.deleting), None)
    count = f"{ready} of {wanted} agents are ready"
    if ready > 0 and trouble is not None and ready < wanted:
        return True, "SomeAgentsReady", f"{count}; {trouble[1]}"
    if ready >= wanted > 0:
        return True, "AllAgentsReady", count
    if ready > 0:
        return True, "SomeAgentsReady", count
    if wanted == 0:
        return False, "ScaledToZero", "spec.replicas is 0"
    return (False, *trouble) if trouble is not None else (False, "AgentsStarting", count)


def _model_loaded(sight: EndpointSight, beats: Mapping[str, Heartbeat]) -> Told:
    failed = next((beat for beat in beats.values() if not beat.model_loaded and beat.error), None)
    if failed is not None:
        return False, "LoadingFailed", f"agent {failed.pod_name}: {failed.error}"
    loaded = sum(beat.model_loaded for beat in beats.values())
    if loaded or sight.ready_replicas:
        return True, "Loaded", "agents have loaded the model"
    trouble = next((pod.trouble for pod in sight.pods if pod.trouble is not None), None)
    if trouble is not None and trouble[0].startswith("Model"):
        return (False, *trouble)
    return None, "NoAgents", "no agent has said so yet"


def _slo_met(endpoint: InferenceEndpoint, serving: Sequence[Heartbeat]) -> Told:
    attained = _attainment(serving)
    if attained is None:
        return None, "NoTraffic", "no request in the last minute"
    promise = endpoint.spec.slo
    limits = f"{promise.time_to_first_token} to the first token and {promise.time_per_output_token} a token"
    text = f"promised: {promise.percentile} % of requests within {limits}"
    return (True, "Attained", text) if attained >= promise.percentile else (False, "Missed", text)


def _scaling_ready(sight: EndpointSight) -> Told:
    if sight.endpoint.spec.autoscaling is None:
        return None, "NotAutoscaled", "spec.autoscaling is not set"
    return sight.autoscaler or (None, "AutoscalerStarting", "the HorizontalPodAutoscaler has not reported yet")


def _mean(values: Sequence[float]) -> int | None:
    return round(sum(values) / len(values)) if values else None


def _attainment(serving: Sequence[Heartbeat]) -> float | None:
    measured = [
        (beat.slo.attainment_percent, beat.slo.requests)
        for beat in serving
        if beat.slo.attainment_percent is not None and beat.slo.requests
    ]
    requests = sum(count for _, count in measured)
    return sum(percent * count for percent, count in measured) / requests if requests else None


def _slo(serving: Sequence[Heartbeat]) -> SloStatus | None:
    """Return the endpoint's figures: the worst agent's percentiles, and the share over all requests."""
    attained = _attainment(serving)
    if attained is None:
        return None
    first = [beat.slo.ttft_p99_ms for beat in serving if beat.slo.ttft_p99_ms is not None]
    each = [beat.slo.tpot_p99_ms for beat in serving if beat.slo.tpot_p99_ms is not None]
    return SloStatus(
        ttft_millis=round(max(first)) if first else None,
        tpot_millis=round(max(each)) if each else None,
        attainment_percent=int(attained),
    )


def _adapters(sight: EndpointSight, serving: Sequence[Heartbeat]) -> tuple[AdapterStatus, ...]:
    records = sight.adapters or {}
    return tuple(
        AdapterStatus(
            name=name,
            version=records[name].number,
            ready_agents=sum(beat.adapters.get(name, 0) >= records[name].number for beat in serving),
            uri=artifact_uri(sight.endpoint.spec.artifact_store.uri, records[name].path),
            sha256=records[name].sha256,
            rank=records[name].rank,
            job_uid=records[name].job_uid,
        )
        for name in sorted(records)
    )


def _agents(beats: Mapping[str, Heartbeat], jobs: Mapping[str, Sequence[str]]) -> tuple[AgentStatus, ...]:
    """Return one entry a pod: a restarted container's heartbeat may still be there beside its successor's."""
    newest = {beat.pod_name: (agent, beat) for agent, beat in sorted(beats.items(), key=lambda item: item[1].ready)}
    return tuple(
        AgentStatus(name=pod, node=beat.node, device=beat.device, jobs=tuple(sorted(jobs.get(agent, ()))))
        for pod, (agent, beat) in sorted(newest.items())
    )
