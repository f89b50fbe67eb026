"""Jobs that are over. There may be ten thousand: of each only what may still be asked of it is kept, and a pass looks
at those alone whose time has come, or whose adapter the endpoint's status does not keep yet.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from coserve_api.conditions import find_condition
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_api.job_status import ContinuedFrom, JobCondition
from coserve_operator.decide.decision import is_final
from coserve_operator.decide.published import Publication, publication, recorded
from coserve_operator.decide.sources import checkpoint_left


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that is over and said so: `version` is its resourceVersion, `expires` when it is to be deleted, in seconds
    of the epoch; `uri` and `sha256` are its last checkpoint's.
    """

    name: str
    uid: str
    version: str
    expires: float | None = None
    adapter: Publication | None = None
    uri: str = ""
    sha256: str = ""

    @property
    def checkpoint(self) -> ContinuedFrom | None:
        """What another job may resume from."""
        return ContinuedFrom(uri=self.uri, sha256=self.sha256) if self.uri else None


def finished(job: FinetuneJob) -> FinishedJob | None:
    """Return what is kept of a job whose status says all that it will ever say; None of any other."""
    status, meta = job.status, job.metadata
    told = all(each.observed_generation == meta.generation for each in status.conditions)
    if not is_final(job) or not told or status.observed_generation != meta.generation:
        return None
    if find_condition(status.conditions, JobCondition.FINISHED) is None:
        return None
    left = checkpoint_left(job)
    return FinishedJob(
        meta.name,
        meta.uid,
        meta.resource_version,
        _expires(job),
        publication(job, status.adapter),
        left.uri if left is not None else "",
        (left.sha256 or "") if left is not None else "",
    )


def _expires(job: FinetuneJob) -> float | None:
    ttl, ended = job.spec.ttl_seconds_after_finished, job.status.completion_time
    if ttl is None or ended is None or job.metadata.deletion_timestamp is not None:
        return None
    return datetime.fromisoformat(ended).timestamp() + ttl


@dataclass
class Finished:
    """Those of one endpoint, by name."""

    by_name: dict[str, FinishedJob] = field(default_factory=dict)
    _unrecorded: dict[str, Publication] = field(default_factory=dict)
    """Adapters that the endpoint's status may not keep yet."""
    _times: list[tuple[float, str]] = field(default_factory=list)
    _due: dict[str, FinishedJob] = field(default_factory=dict)

    def put(self, job: FinishedJob) -> None:
        """Take a job that is over."""
        self.remove(job.name)
        self.by_name[job.name] = job
        if job.adapter is not None:
            self._unrecorded[job.name] = job.adapter
        if job.expires is not None:
            heapq.heappush(self._times, (job.expires, job.name))

    def remove(self, name: str) -> None:
        """Drop a job that is gone."""
        self.by_name.pop(name, None)
        self._unrecorded.pop(name, None)
        self._due.pop(name, None)

    def look_again(self) -> None:
        """The endpoint's status may have lost adapters."""
        self._unrecorded = {job.name: job.adapter for job in self.by_name.values() if job.adapter is not None}

    def unrecorded(self, endpoint: InferenceEndpoint) -> Iterable[Publication]:
        """Return the adapters that the endpoint's status does not keep yet."""
        if self._unrecorded:
            kept = {each.name: each.version for each in endpoint.status.adapters}
            self._unrecorded = {
                name: each for name, each in self._unrecorded.items() if not recorded(each, endpoint, kept)
            }
        return self._unrecorded.values()

    def due(self, now: datetime, endpoint: InferenceEndpoint | None) -> list[FinishedJob]:
        """Return the jobs to delete now. One with an adapter waits until the endpoint's status keeps that."""
        while self._times and self._times[0][0] <= now.timestamp():
            expires, name = heapq.heappop(self._times)
            job = self.by_name.get(name)
            if job is not None and job.expires == expires:
                self._due[name] = job
        if endpoint is None:
            return list(self._due.values())
        self.unrecorded(endpoint)
        return [job for name, job in self._due.items() if name not in self._unrecorded]

    def next_due_s(self, now: datetime) -> float | None:
        """Return in how many seconds to look at `due` again."""
        return max(0.0, self._times[0][0] - now.timestamp()) if self._times else None
