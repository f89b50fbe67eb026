"""What a decision on a FinetuneJob is made from, and what it says."""

from dataclasses import dataclass, field

from coserve_api.conditions import find_condition
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_api.job_status import BackoffStatus, ContinuedFrom, JobCondition, JobState, PublishedAdapter
from coserve_contract.store import JobRecord
from coserve_operator.decide.actions import FeederAction, RedisAction
from coserve_operator.decide.claims import Claims
from coserve_operator.decide.observed import FeederView, Obstacle, RedisView, Unreadable


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """Everything that a decision on `job` is made from. `leaving` holds the ids of agents that are to go, `source` is
    what the job goes on from, an adapter or a checkpoint, once it is known; `surplus` says that its agent may run fewer
    jobs, `disrupted` that the pod that it was bound to was taken away; `unreadable` why Redis is not known, `obstacle`
    why its feeder could not be made; `claims` are those of the endpoint's living jobs.
    """

    job: FinetuneJob
    endpoint: InferenceEndpoint | None
    claims: Claims = field(default_factory=Claims)
    redis: RedisView | None = None
    feeder: FeederView | None = None
    feeder_inputs: str = ""
    leaving: frozenset[str] = frozenset()
    adapter_number: int = 1
    source: ContinuedFrom | None = None
    surplus: bool = False
    disrupted: bool = False
    unreadable: Unreadable | None = None
    obstacle: Obstacle | None = None
    endpoint_goes: bool = False
    """It is being deleted."""
    feeder_secret: str = ""
    """That with the Redis user which a feeder is to have."""

    @property
    def record(self) -> JobRecord:
        """What Redis knows of the job; nothing is known without Redis."""
        return (self.redis.jobs.get(self.job.metadata.uid) if self.redis else None) or JobRecord()


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job stands. With `wants_agent` it takes part in the placement; `epoch` is the highest ever used;
    `stalled`: it cannot go on before somebody changes something.
    """

    state: JobState
    reason: str
    message: str = ""
    epoch: int = 0
    agent: str = ""
    pod: str = ""
    node: str = ""
    training: bool = False
    wants_agent: bool = False
    place: int = 0
    """In the queue, from 1; 0 where it is in none."""
    restarts: int = 0
    backoff: BackoffStatus | None = None
    adapter: PublishedAdapter | None = None
    published: tuple[bool, str, str] | None = None
    actions: tuple[RedisAction, ...] = ()
    feeder: FeederAction = FeederAction.KEEP
    requeue_after_s: float | None = None
    stalled: bool = False
    waits_for_feeder: bool = False
    """Which cannot start, for the reason that is named."""
    settled: bool = True
    """False: the status stays as it is, since the job is over or too little is known."""

    @property
    def is_final(self) -> bool:
        """Return whether nothing will change any more."""
        return self.state in (JobState.COMPLETE, JobState.FAILED)


def is_final(job: FinetuneJob) -> bool:
    """Return whether the status says that the job is over."""
    ends = (find_condition(job.status.conditions, each) for each in (JobCondition.COMPLETE, JobCondition.FAILED))
    return any(end is not None and end.status == "True" for end in ends)
