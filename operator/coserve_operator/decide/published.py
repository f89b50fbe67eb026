"""Which adapter versions an endpoint has, and which of them it serves: the newest of each name, unless spec.adapters
says otherwise.

They outlive their jobs: deleting a FinetuneJob takes nothing away from those who call its adapter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coserve_api.adapters import MAX_ADAPTERS, MAX_OLDER, AdapterOverride, AdapterState, AdapterStatus, AdapterVersion
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import DEFAULT_RANK, FinetuneJob
from coserve_api.job_status import PublishedAdapter
from coserve_api.uris import artifact_uri, relative_path
from coserve_contract.messages import AdapterRecord

Versions = Mapping[str, tuple[AdapterRecord, ...]]
"""Of each name, newest first; at least one."""


@dataclass(frozen=True, slots=True)
class Publication:
    """An adapter version that a job published, when it `ended` if it has."""

    job_uid: str
    name: str
    version: int
    uri: str
    sha256: str
    rank: int
    ended: str | None = None
    publisher: str = ""


def publication(job: FinetuneJob, adapter: PublishedAdapter | None) -> Publication | None:
    """Return what the job published, if anything."""
    if adapter is None:
        return None
    rank = adapter.rank or job.spec.adapter.rank or DEFAULT_RANK
    ended = job.status.completion_time
    uri, sha256 = adapter.uri, adapter.sha256
    return Publication(job.metadata.uid, adapter.name, adapter.version, uri, sha256, rank, ended, job.publisher)


def published(
    endpoint: InferenceEndpoint, by_jobs: Iterable[Publication | None], in_redis: Mapping[str, AdapterRecord]
) -> Versions:
    """Return the known versions, from the endpoint's status, its jobs' adapters and what Redis holds; never more names
    than a status takes, whatever Redis holds.
    """
    found: dict[str, dict[int, AdapterRecord]] = {}
    for record in (*_of_status(endpoint), *_of_jobs(endpoint, by_jobs), *in_redis.values()):
        if record.name in found or len(found) < MAX_ADAPTERS:
            found.setdefault(record.name, {}).setdefault(record.number, record)
    return {name: tuple(each[number] for number in sorted(each, reverse=True)) for name, each in found.items()}


def owners(endpoint: InferenceEndpoint, by_jobs: Iterable[Publication | None]) -> dict[str, str]:
    """Return to whom names belong: to who published first, unless spec.adapters says otherwise."""
    found = {each.name: each.publisher for each in endpoint.status.adapters}
    found |= {each.name: each.publisher for each in endpoint.spec.adapters if each.publisher is not None}
    free = {each.name for each in endpoint.spec.adapters if each.publisher == ""}
    for each in sorted(filter(None, by_jobs), key=lambda one: one.version):
        if not found.get(each.name) and each.name not in free and not _of_an_earlier_endpoint(each, endpoint):
            found[each.name] = each.publisher
    return {name: publisher for name, publisher in found.items() if publisher}


def served(endpoint: InferenceEndpoint, known: Versions) -> dict[str, AdapterRecord]:
    """Return what agents are to serve under each name."""
    overrides = {each.name: each for each in endpoint.spec.adapters}
    now = {each.name: each.served_version for each in endpoint.status.adapters}
    chosen = {name: _chosen(overrides.get(name), versions, now.get(name)) for name, versions in known.items()}
    return {name: record for name, record in chosen.items() if record is not None}


def _chosen(
    override: AdapterOverride | None, versions: tuple[AdapterRecord, ...], now: int | None
) -> AdapterRecord | None:
    """Return the version to serve, if any. Where a pinned one is not known, what is served `now` stays."""
    if override is None:
        return versions[0]
    if override.state is AdapterState.ABSENT:
        return None
    if override.version is None:
        return versions[0]
    by_number = {each.number: each for each in versions}
    return by_number.get(override.version) or by_number.get(now or 0)


def greatest_rank(known: Versions) -> int:
    """Return the greatest rank of a known version; spec.finetuning.maxRank may have been lowered since."""
    return max((each.rank for versions in known.values() for each in versions), default=0)


def trained_rank(jobs: Iterable[FinetuneJob]) -> int:
    """Return the greatest rank of a job that has begun and is not over: it goes on where agents have room for it."""
    begun = (job for job in jobs if job.status.start_time is not None and job.status.completion_time is None)
    return max((job.spec.adapter.rank or DEFAULT_RANK for job in begun if job.spec.adapter.source is None), default=0)


def last_numbers(endpoint: InferenceEndpoint, known: Versions) -> dict[str, int]:
    """Return the number of the newest version of each name."""
    numbers = {name: versions[0].number for name, versions in known.items()}
    for each in endpoint.status.adapters:
        numbers[each.name] = max(each.version, numbers.get(each.name, 0))
    return numbers


def statuses(
    endpoint: InferenceEndpoint,
    known: Versions,
    serving: Mapping[str, AdapterRecord],
    loaded: Mapping[str, int],
    belongs: Mapping[str, str],
) -> tuple[AdapterStatus, ...]:
    """Return the status of each name; `loaded` says how many agents have the version that is to be served, `belongs` to
    whom names do.
    """
    store = endpoint.spec.artifact_store.uri
    return tuple(
        AdapterStatus(
            name=name,
            served_version=serving[name].number if name in serving else None,
            ready_agents=loaded.get(name, 0),
            publisher=belongs.get(name, ""),
            older=tuple(AdapterVersion(**_told(store, each)) for each in _kept(versions[1:], serving.get(name))),
            **_told(store, versions[0]),
        )
        for name, versions in sorted(known.items())
    )


def _told(store: str, record: AdapterRecord) -> dict[str, Any]:
    """Return what a status says of a version."""
    return {
        "version": record.number,
        "uri": artifact_uri(store, record.path),
        "sha256": record.sha256,
        "rank": record.rank,
        "job_uid": record.job_uid,
    }


def _kept(older: tuple[AdapterRecord, ...], serving: AdapterRecord | None) -> tuple[AdapterRecord, ...]:
    """Return the newest of them; one that is served is among them."""
    if serving is None or serving not in older[MAX_OLDER:]:
        return older[:MAX_OLDER]
    return (*older[: MAX_OLDER - 1], serving)


def recorded(adapter: Publication, endpoint: InferenceEndpoint, kept: Mapping[str, int]) -> bool:
    """Return whether the endpoint keeps the adapter by itself, or never had it; its status has the versions `kept`."""
    return _of_an_earlier_endpoint(adapter, endpoint) or kept.get(adapter.name, 0) >= adapter.version


def _of_an_earlier_endpoint(adapter: Publication, endpoint: InferenceEndpoint) -> bool:
    """Return whether it was published on another endpoint of this name, perhaps with another model."""
    made = endpoint.metadata.creation_timestamp or ""
    return (adapter.ended or made) < made


def _of_jobs(endpoint: InferenceEndpoint, by_jobs: Iterable[Publication | None]) -> Iterable[AdapterRecord]:
    for each in by_jobs:
        if each is None or _of_an_earlier_endpoint(each, endpoint):
            continue
        try:
            path = relative_path(endpoint.spec.artifact_store.uri, each.uri)
        except InvalidValueError:
            continue
        yield AdapterRecord(
            name=each.name, number=each.version, path=path, sha256=each.sha256, job_uid=each.job_uid, rank=each.rank
        )


def _of_status(endpoint: InferenceEndpoint) -> Iterable[AdapterRecord]:
    store = endpoint.spec.artifact_store.uri
    for each in endpoint.status.adapters:
        versions: tuple[AdapterStatus | AdapterVersion, ...] = (each, *each.older)
        for one in versions:
            if one.sha256:
                yield AdapterRecord(
                    name=each.name,
                    number=one.version,
                    path=relative_path(store, one.uri),
                    sha256=one.sha256,
                    job_uid=one.job_uid,
                    rank=one.rank,
                )
