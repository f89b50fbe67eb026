"""Which living jobs have which adapter names of an endpoint: made once a pass and looked up, since jobs may be
thousands.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from coserve_api.adapters import MAX_ADAPTERS
from coserve_api.job import FinetuneJob, PublishPolicy


@dataclass(frozen=True, slots=True)
class Claims:
    """`holders` are the jobs that have a name; `ahead` counts, by the job's uid, the names that the endpoint has or
    gets before the job's; `published` are the names that it has; `owners` say to whom names belong.
    """

    holders: Mapping[str, FinetuneJob] = field(default_factory=dict)
    ahead: Mapping[str, int] = field(default_factory=dict)
    published: Collection[str] = ()
    owners: Mapping[str, str] = field(default_factory=dict)

    def owner_elsewhere(self, job: FinetuneJob) -> str:
        """Return to whom the name belongs under which the job would publish, if to another; else nothing."""
        owner = self.owners.get(job.spec.adapter.name, "")
        return "" if job.spec.publish.policy is PublishPolicy.NEVER or owner == job.publisher else owner

    def holder(self, job: FinetuneJob) -> FinetuneJob:
        """Return who has the job's name."""
        return self.holders.get(job.spec.adapter.name, job)

    def has_room(self, job: FinetuneJob) -> bool:
        """Return whether the endpoint's status takes the job's name, beside those that come before it."""
        if job.spec.publish.policy is PublishPolicy.NEVER or job.spec.adapter.name in self.published:
            return True
        return self.ahead.get(job.metadata.uid, 0) < MAX_ADAPTERS


def claims(
    living: Iterable[FinetuneJob], published: Collection[str], owners: Mapping[str, str] | None = None
) -> Claims:
    """Return what living jobs claim beside the `published` names: started jobs come before others, then the older."""
    holders: dict[str, FinetuneJob] = {}
    ahead: dict[str, int] = {}
    names = set(published)
    for job in sorted(living, key=_precedence):
        ahead[job.metadata.uid] = len(names)
        names.add(job.spec.adapter.name)
        holders.setdefault(job.spec.adapter.name, job)
    return Claims(holders, ahead, published, owners or {})


def _precedence(job: FinetuneJob) -> tuple[bool, str, str]:
    return job.status.start_time is None, job.metadata.creation_timestamp or "", job.metadata.uid
