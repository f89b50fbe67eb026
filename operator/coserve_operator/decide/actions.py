"""What a decision asks for: of Redis, in the order given, and of the feeder."""

from dataclasses import dataclass
from enum import StrEnum

from coserve_contract.messages import Binding


@dataclass(frozen=True, slots=True)
class Bind:
    """Give the job to an agent under the binding's epoch; under an epoch that Redis lost, give it again."""

    job_uid: str
    agent: str
    binding: Binding


@dataclass(frozen=True, slots=True)
class UpdateBinding:
    """Tell the bound agent something else under the same epoch."""

    job_uid: str
    agent: str
    binding: Binding


@dataclass(frozen=True, slots=True)
class Unbind:
    """Leave the job to nobody."""

    job_uid: str
    agent: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete what Redis holds of the job."""

    job_uid: str


@dataclass(frozen=True, slots=True)
class ClearStreams:
    """Delete the shards that Redis holds of a job that nobody runs; a feeder fills them again from the checkpoint."""

    job_uid: str


RedisAction = Bind | UpdateBinding | Unbind | Forget | ClearStreams


class FeederAction(StrEnum):
    """What should be with the feeder."""

    KEEP = "keep"
    RUN = "run"
    CHECK = "check"
    """Read the data, say what they are, and end."""
    SUSPEND = "suspend"
    RENEW = "renew"
    REMOVE = "remove"
