"""Which adapter versions an endpoint serves: each stays until its endpoint goes or a newer one replaces it.

They outlive their jobs: deleting a FinetuneJob takes nothing away from those who call its adapter.
"""

from collections.abc import Iterable, Mapping

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import DEFAULT_RANK, FinetuneJob
from coserve_api.job_status import PublishedAdapter
from coserve_api.messages import AdapterRecord
from coserve_api.uris import relative_path


def published(
    endpoint: InferenceEndpoint,
    jobs: Iterable[tuple[FinetuneJob, PublishedAdapter | None]],
    in_redis: Mapping[str, AdapterRecord],
) -> dict[str, AdapterRecord]:
    """Return the newest version of each name, from what Redis holds, the endpoint's status and its jobs' adapters."""
    found = dict(in_redis)
    for record in (*_of_jobs(endpoint, jobs), *_of_status(endpoint)):
        known = found.get(record.name)
        if known is None or known.number < record.number:
            found[record.name] = record
    return found


def next_number(name: str, endpoint: InferenceEndpoint, known: Mapping[str, AdapterRecord]) -> int:
    """Return the number of the next version of `name`."""
    in_status = max((each.version for each in endpoint.status.adapters if each.name == name), default=0)
    return max(in_status, known[name].number if name in known else 0) + 1


def _of_jobs(
    endpoint: InferenceEndpoint, jobs: Iterable[tuple[FinetuneJob, PublishedAdapter | None]]
) -> Iterable[AdapterRecord]:
    made = endpoint.metadata.creation_timestamp or ""
    for job, adapter in jobs:
        if adapter is None or (job.status.completion_time or made) < made:
            continue  # published on an earlier endpoint of this name, perhaps with another model
        try:
            path = relative_path(endpoint.spec.artifact_store.uri, adapter.uri)
        except InvalidValueError:
            continue
        yield AdapterRecord(
            name=adapter.name,
            number=adapter.version,
            path=path,
            sha256=adapter.sha256,
            job_uid=job.metadata.uid,
            rank=adapter.rank or job.spec.adapter.rank or DEFAULT_RANK,
        )


def _of_status(endpoint: InferenceEndpoint) -> Iterable[AdapterRecord]:
    for each in endpoint.status.adapters:
        if each.sha256:
            yield AdapterRecord(
                name=each.name,
                number=each.version,
                path=relative_path(endpoint.spec.artifact_store.uri, each.uri),
                sha256=each.sha256,
                job_uid=each.job_uid,
                rank=each.rank,
            )
