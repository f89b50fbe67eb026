"""Every Redis key, in one place. The endpoint's UID in braces is Redis Cluster's hash tag and the pattern of the
endpoint's ACL user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from coserve_api.errors import InvalidValueError

ENDPOINT_INDEX = "cs:endpoints"
"""Set of endpoint UIDs with keys, for the operator's sweep. No endpoint's user can read it."""

OF_JOB = ("fence", "owner", "checkpoint", "progress", "result", "shards", "eval", "feed")
"""What there is of a job."""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,127}")


def agent_id(pod_uid: str, boot_id: str) -> str:
    """An agent's identity: a restarted container (another boot id) is another agent."""
    return f"{_part('pod uid', pod_uid)}.{_part('boot id', boot_id)}"


def _part(what: str, value: str) -> str:
    if not _PART.fullmatch(value):
        raise InvalidValueError(f"{what} {value[:80]!r} must be 1 to 128 letters, digits, '.' and '-'")
    return value


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one endpoint. Arguments are checked, since a ':' or '}' in one would name another's key."""

    endpoint_uid: str

    def __post_init__(self) -> None:
        _part("endpoint uid", self.endpoint_uid)

    @property
    def prefix(self) -> str:
        return "cs:{" + self.endpoint_uid + "}:"

    def token(self) -> str:
        """String: the greatest fencing token of an operator that wrote here. The endpoint's user cannot name it."""
        return "cs:token:{" + self.endpoint_uid + "}"

    def incarnation(self) -> str:
        """String: random, written by the operator; changes when Redis lost something."""
        return self.prefix + "incarnation"

    def changed(self) -> str:
        """String: anything, and another whenever the operator should look; who has changed something writes it."""
        return self.prefix + "changed"

    def agents(self) -> str:
        """Sorted set: agent id -> last heartbeat, ms of Redis's clock."""
        return self.prefix + "agents"

    def agent(self, agent: str) -> str:
        """String with TTL: Heartbeat."""
        return f"{self.prefix}agent:{_part('agent id', agent)}"

    def bindings(self, agent: str) -> str:
        """Hash: job uid -> Binding."""
        return self.agent(agent) + ":bindings"

    def adapters(self) -> str:
        """Hash: name -> AdapterRecord."""
        return self.prefix + "adapters"

    def jobs(self) -> str:
        """Set: job uids with keys here."""
        return self.prefix + "jobs"

    def _job(self, job: str, what: str) -> str:
        return f"{self.prefix}job:{_part('job uid', job)}:{what}"

    def fence(self, job: str) -> str:
        """Hash without TTL: epoch, agent (empty: bound to none)."""
        return self._job(job, "fence")

    def owner(self, job: str) -> str:
        """String with TTL: the lease, `AGENT:EPOCH`."""
        return self._job(job, "owner")

    def checkpoint(self, job: str) -> str:
        """String: the accepted Checkpoint."""
        return self._job(job, "checkpoint")

    def progress(self, job: str) -> str:
        """String: Progress."""
        return self._job(job, "progress")

    def result(self, job: str) -> str:
        """String: JobResult."""
        return self._job(job, "result")

    def shards(self, job: str) -> str:
        """Stream: training shards; shard n has the ID n-0. It holds cursor+1, cursor+2, ... without a gap."""
        return self._job(job, "shards")

    def eval(self, job: str) -> str:
        """Stream: held-out shards; shard n has the ID n-0."""
        return self._job(job, "eval")

    def feed(self, job: str) -> str:
        """String: FeedStatus."""
        return self._job(job, "feed")

    def all_of_job(self, job: str) -> tuple[str, ...]:
        """Every key of a job: those of OF_JOB."""
        start = self._job(job, "")
        return tuple(start + what for what in OF_JOB)
