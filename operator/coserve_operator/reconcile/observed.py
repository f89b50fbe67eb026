"""What a decision is made from: values that were read, without a way back to where they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coserve_api.errors import MessageError
from coserve_api.messages import AdapterRecord, Binding, Heartbeat
from coserve_api.store import JobRecord


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


@dataclass(frozen=True, slots=True)
class PodView:
    """An agent's pod as the API server has it.

    `trouble` is (reason, message) when it cannot start; `leaving_since` is in seconds of the epoch.
    """

    name: str
    uid: str
    ready: bool = False
    deleting: bool = False
    scheduled: bool = True
    leaving_since: float | None = None
    trouble: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class FeederView:
    """A job's feeder: `inputs` is the digest it was made from, `failure` its last message when it gave up."""

    uid: str
    inputs: str
    suspended: bool = False
    finished: bool = False
    active: bool = False
    failure: str | None = None
    trouble: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """An event for `kubectl describe`."""

    reason: str
    message: str
    warning: bool = False
