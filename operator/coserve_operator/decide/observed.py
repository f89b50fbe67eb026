"""What a decision is made from: values that were read, without a way back to where they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coserve_api.errors import MessageError
from coserve_contract.messages import AdapterRecord, Binding, Heartbeat
from coserve_contract.store import JobRecord


@dataclass(frozen=True, slots=True)
class RedisView:
    """What Redis holds of one endpoint.

    `settled` says that every living agent has had the time for a heartbeat since Redis could last be read without a
    gap, so that a missing one means a lost agent. `bindings` holds, by job uid, what the agent named in the job's fence
    was told; `lost_agents` counts those in the index without a heartbeat.
    """

    incarnation: str | None = None
    agents: Mapping[str, Heartbeat] = field(default_factory=dict)
    jobs: Mapping[str, JobRecord] = field(default_factory=dict)
    bindings: Mapping[str, Binding] = field(default_factory=dict)
    known_jobs: frozenset[str] = frozenset()
    adapters: Mapping[str, AdapterRecord] = field(default_factory=dict)
    broken: tuple[MessageError, ...] = ()
    settled: bool = False
    lost_agents: int = 0

    def agent_with(self, pod: str, job_uid: str, epoch: int) -> str | None:
        """Return the agent of `pod` that says it runs the job under `epoch`."""
        for agent, beat in self.agents.items():
            running = beat.jobs.get(job_uid)
            if beat.pod_name == pod and running is not None and running.epoch == epoch:
                return agent
        return None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why nothing is known of what Redis holds of an endpoint: a condition's reason and message."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why something that we need cannot be made: a condition's reason and message. One that is `passing` goes away
    without anybody's help.
    """

    reason: str
    message: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class PodView:
    """An agent's pod as the API server has it.

    `trouble` is (reason, message) when it cannot start; `leaving_since`, and `creating_since`, while its containers are
    being made, are in seconds of the epoch; `template` is the digest of the template that it was made from;
    `disrupted`: the cluster takes it away (a drain, an eviction).
    """

    name: str
    uid: str
    ready: bool = False
    deleting: bool = False
    disrupted: bool = False
    scheduled: bool = True
    leaving_since: float | None = None
    trouble: tuple[str, str] | None = None
    template: str = ""
    creating_since: float | None = None


@dataclass(frozen=True, slots=True)
class RolloutView:
    """What an endpoint's Deployment was made from: digests of its pods' template, for `jobs` jobs at once, and of how
    this operator builds one. `in_turn` says that its agents are replaced, or were, for a new version of ours.
    """

    made_from: str = ""
    builder: str = ""
    jobs: int = 0
    in_turn: bool = False
    serves: bool = False
    complete: bool = False


@dataclass(frozen=True, slots=True)
class FeederView:
    """A job's feeder: `inputs` is the digest it was made from, `failure` its last message when it gave up, at
    `failed_at` in seconds of the epoch; one that only `checks` pushes no shard.
    """

    uid: str
    inputs: str
    checks: bool = False
    suspended: bool = False
    finished: bool = False
    active: bool = False
    failure: str | None = None
    failed_at: float = 0.0
    trouble: tuple[str, str] | None = None
    podless: bool = False
    """It runs and has no pod: its controller may be refused them."""
    creating: PodView | None = None
    """Its pod, while its containers are being made."""
    secret: str = ""
    """That with its Redis user: another one means another password, or another Redis."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Of an object that the endpoint owns, a field that `manager` has changed `times` times. It is taken back in
    `wait_s` seconds, and forgotten in `calm_s` if nothing more happens.
    """

    what: str
    path: str
    manager: str
    times: int
    wait_s: float
    calm_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """An event for `kubectl describe`."""

    reason: str
    message: str
    warning: bool = False
