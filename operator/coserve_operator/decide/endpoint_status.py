"""An InferenceEndpoint's status from its pods, heartbeats and jobs, and the events that tell of its changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from coserve_api.adapters import AdapterStatus
from coserve_api.conditions import condition, find_condition, merge_conditions
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.endpoint_status import AgentStatus, EndpointCondition, EndpointStatus, SloStatus
from coserve_contract.messages import AdapterRecord, Heartbeat
from coserve_operator.decide import adapter_status
from coserve_operator.decide.observed import Drift, Event, Obstacle, PodView, RedisView, Unreadable
from coserve_operator.decide.published import Versions, statuses
from coserve_operator.manifests.endpoint import url
from coserve_operator.manifests.metadata import selector

Told = tuple[bool | None, str, str]
"""A condition's status, reason and message."""


@dataclass(frozen=True, slots=True)
class ObservedEndpoint:
    """Everything that an endpoint's status is made from.

    `agent_jobs` maps agent ids to the names of the jobs bound there; `adapters` are those that agents are to serve, of
    the `published` ones; `owners` are those of their names; `autoscaler` is what the HPA says of itself, None without
    one; `autoscaler_obstacle` is why there can be none; `obstacle` is why an object or its pods could not be made;
    `template` is the digest of the newest template of the pods, None while they are to be replaced for a new version of
    ours, and other endpoints' are meanwhile: then any will do; `drifts` are fields of its objects that somebody else
    changes again and again.
    """

    endpoint: InferenceEndpoint
    pods: Sequence[PodView] = ()
    replicas: int = 0
    ready_replicas: int = 0
    redis: RedisView | None = None
    unreadable: Unreadable | None = None
    agent_jobs: Mapping[str, Sequence[str]] | None = None
    published: Versions | None = None
    adapters: Mapping[str, AdapterRecord] | None = None
    owners: Mapping[str, str] = field(default_factory=dict)
    autoscaler: Told | None = None
    autoscaler_obstacle: tuple[str, str] | None = None
    obstacle: Obstacle | None = None
    drifts: Sequence[Drift] = ()
    template: str | None = ""

    @property
    def live(self) -> Sequence[PodView]:
        """Pods that are not going."""
        return [pod for pod in self.pods if not pod.deleting]

    def is_newest(self, pod: PodView) -> bool:
        """Whether a pod is of the newest template."""
        return self.template is None or pod.template == self.template

    @property
    def newest_ready(self) -> int:
        """Ready pods of the newest template."""
        return sum(pod.ready and self.is_newest(pod) for pod in self.live)

    @property
    def trouble(self) -> tuple[str, str] | None:
        """Why a pod does not start, those of the newest template first."""
        newest_first = sorted(self.live, key=lambda pod: not self.is_newest(pod))
        return next((pod.trouble for pod in newest_first if pod.trouble is not None), None)


_NO_FAULT = {
    "AllAgentsReady", "SomeAgentsReady", "AgentsStarting", "RollingOut", "ScaledToZero", "WaitingForDeletion",
}  # fmt: skip
"""Reasons of Ready that nobody has to do anything about."""


def status_of(observed: ObservedEndpoint, now: datetime) -> EndpointStatus:
    """Return the endpoint's status."""
    endpoint, redis = observed.endpoint, observed.redis
    old, generation = endpoint.status, endpoint.metadata.generation
    beats = redis.agents if redis is not None else {}
    serving = [beat for beat in beats.values() if beat.ready]
    told: dict[EndpointCondition, Told] = {
        EndpointCondition.ACCEPTED: (True, "Accepted", ""),
        EndpointCondition.READY: _ready(observed),
        EndpointCondition.AVAILABLE: _available(observed),
        EndpointCondition.RECONCILING: _reconciling(observed),
        EndpointCondition.STALLED: _stalled(observed),
        EndpointCondition.MODEL_LOADED: _model_loaded(observed, beats),
        EndpointCondition.SLO_MET: _slo_met(observed, serving),
        EndpointCondition.SCALING_READY: _scaling_ready(observed),
        EndpointCondition.REDIS_READY: _redis_ready(observed),
        EndpointCondition.ADAPTERS_READY: _adapters_ready(observed, serving),
    }
    if observed.drifts or find_condition(old.conditions, EndpointCondition.DRIFTED) is not None:
        told[EndpointCondition.DRIFTED] = _drifted(observed.drifts)
    new = [condition(kind, *each, generation=generation, now=now) for kind, each in told.items()]
    jobs = observed.agent_jobs or {}
    return EndpointStatus(
        **old.unknown,
        observed_generation=generation,
        replicas=observed.replicas,
        ready_replicas=observed.ready_replicas,
        selector=selector(endpoint.metadata.name),
        url=url(endpoint),
        saturation_percent=_mean([beat.load.saturation_percent for beat in serving]),
        slo=_slo(serving) if redis is not None else old.slo,
        adapters=_adapters(observed, serving) if redis is not None else old.adapters,
        agents=_agents(beats, jobs) if redis is not None else old.agents,
        jobs=sum(len(names) for names in jobs.values()) if redis is not None else old.jobs,
        conditions=merge_conditions(old.conditions, new),
    )


def events(old: EndpointStatus, new: EndpointStatus) -> list[Event]:
    """Return the events of a changed readiness."""
    before = find_condition(old.conditions, EndpointCondition.READY)
    after = find_condition(new.conditions, EndpointCondition.READY)
    if after is None or (before is not None and (before.status, before.reason) == (after.status, after.reason)):
        return []
    if (before is None or before.reason == "Accepted") and after.reason == "AgentsStarting":
        return []
    return [Event(after.reason, after.message, warning=after.reason not in _NO_FAULT)]


def _ready(observed: ObservedEndpoint) -> Told:
    """Say whether agents of the spec as it is now are ready; those of an older one do not count."""
    wanted, ready, trouble = observed.endpoint.spec.replicas, observed.newest_ready, observed.trouble
    turn = "; a newer version waits until other endpoints have it" if observed.template is None else ""
    count = f"{ready} of {wanted} agents are ready{turn}"
    older = sum(pod.ready for pod in observed.live) - ready
    if older:
        count += f"; {older} of an older spec serve until they are replaced"
    if observed.obstacle is not None:
        return ready > 0, observed.obstacle.reason, f"{count}; {observed.obstacle.message}"
    if wanted == 0:
        return False, "ScaledToZero", "spec.replicas is 0"
    if ready >= wanted:
        return True, "AllAgentsReady", count
    if ready > 0:
        return True, "SomeAgentsReady", count if trouble is None else f"{count}; {trouble[1]}"
    if trouble is not None:
        return False, trouble[0], f"{count}; {trouble[1]}" if older else trouble[1]
    return False, "RollingOut" if older else "AgentsStarting", count


def _available(observed: ObservedEndpoint) -> Told:
    ready = sum(pod.ready for pod in observed.live)
    return (True, "AgentsReady", f"{ready} agents serve") if ready else (False, "NoAgentReady", "no agent serves")


def _reconciling(observed: ObservedEndpoint) -> Told:
    """Say whether something is under way: for kstatus never beside Stalled."""
    wanted, live = observed.endpoint.spec.replicas, observed.live
    if _stalled(observed)[0]:
        return False, "Stalled", ""
    if len(live) == observed.newest_ready == wanted:
        return False, "Reconciled", ""
    older = sum(not observed.is_newest(pod) for pod in live)
    if older:
        return True, "RollingOut", f"{older} of {len(live)} agents are of an older spec"
    return True, "Scaling", f"{observed.newest_ready} of {len(live)} agents are ready, and {wanted} are wanted"


def _stalled(observed: ObservedEndpoint) -> Told:
    """Say whether it cannot go on before somebody changes something; more nodes may come by themselves."""
    obstacle, trouble = observed.obstacle, observed.trouble
    if obstacle is not None and not obstacle.passing:
        return True, obstacle.reason, obstacle.message
    if trouble is not None and trouble[0] != "Unschedulable" and not observed.newest_ready:
        return (True, *trouble)
    return False, "NotStalled", ""


def _model_loaded(observed: ObservedEndpoint, beats: Mapping[str, Heartbeat]) -> Told:
    failed = next((beat for beat in beats.values() if not beat.model_loaded and beat.error), None)
    if failed is not None:
        return False, "LoadingFailed", f"agent {failed.pod_name}: {failed.error}"
    loaded = sum(beat.model_loaded for beat in beats.values())
    if loaded or observed.ready_replicas:
        return True, "Loaded", "agents have loaded the model"
    trouble = next((pod.trouble for pod in observed.pods if pod.trouble is not None), None)
    if trouble is not None and trouble[0].startswith("Model"):
        return (False, *trouble)
    return None, "NoAgents", "no agent has said so yet"


def _slo_met(observed: ObservedEndpoint, serving: Sequence[Heartbeat]) -> Told:
    if observed.redis is None:
        return None, "NotKnown", "Redis cannot be read, and with it what agents measure"
    endpoint = observed.endpoint
    attained = _attainment(serving)
    if attained is None:
        return None, "NoTraffic", "no request in the last minute"
    promise = endpoint.spec.slo
    limits = f"{promise.time_to_first_token} to the first token and {promise.time_per_output_token} a token"
    text = f"promised: {promise.percentile} % of requests within {limits}"
    return (True, "Attained", text) if attained >= promise.percentile else (False, "Missed", text)


def _scaling_ready(observed: ObservedEndpoint) -> Told:
    if observed.endpoint.spec.autoscaling is None:
        return None, "NotAutoscaled", "spec.autoscaling is not set"
    if observed.autoscaler_obstacle is not None:
        return (False, *observed.autoscaler_obstacle)
    return observed.autoscaler or (None, "AutoscalerStarting", "the HorizontalPodAutoscaler has not reported yet")


def _redis_ready(observed: ObservedEndpoint) -> Told:
    """What Redis holds is written by pods of the endpoint's namespace, and may be anything."""
    if observed.unreadable is not None:
        return False, observed.unreadable.reason, observed.unreadable.message
    if observed.redis is None:
        return None, "NotRead", "Redis has not been read yet"
    if observed.redis.broken:
        more = len(observed.redis.broken) - 1
        return False, "InvalidContent", f"{observed.redis.broken[0]}" + (f"; and {more} more" if more else "")
    return True, "Readable", "what agents and feeders write can be read"


def _drifted(drifts: Sequence[Drift]) -> Told:
    if not drifts:
        return False, "Settled", "nobody has changed our fields for a while"
    first = drifts[0]
    more = f"; and {len(drifts) - 1} more objects" if len(drifts) > 1 else ""
    times = f"changed by {first.manager} {first.times} times, and is taken back less and less often"
    return True, "ChangedByOthers", f"{first.path} of {first.what} was {times}: let it be{more}"


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


def _adapters_ready(observed: ObservedEndpoint, serving: Sequence[Heartbeat]) -> Told:
    if observed.redis is None:
        return None, "NotKnown", "Redis cannot be read, and with it what agents have loaded"
    return adapter_status.told(observed.endpoint, observed.published or {}, observed.adapters or {}, serving)


def _adapters(observed: ObservedEndpoint, serving: Sequence[Heartbeat]) -> tuple[AdapterStatus, ...]:
    records = observed.adapters or {}
    loaded = {name: adapter_status.count(record, serving) for name, record in records.items()}
    return statuses(observed.endpoint, observed.published or {}, records, loaded, observed.owners)


def _agents(beats: Mapping[str, Heartbeat], jobs: Mapping[str, Sequence[str]]) -> tuple[AgentStatus, ...]:
    """Return one entry a pod: a restarted container's heartbeat may still be there beside its successor's."""
    newest = {beat.pod_name: (agent, beat) for agent, beat in sorted(beats.items(), key=lambda item: item[1].ready)}
    return tuple(
        AgentStatus(name=pod, node=beat.node, device=beat.device, jobs=tuple(sorted(jobs.get(agent, ()))))
        for pod, (agent, beat) in sorted(newest.items())
    )
