"""What a job goes on from: which folder its `adapter.from` or `resumeFrom` means, and whether agents can read it."""

import re
from collections.abc import Callable, Mapping

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import FinetuneJob
from coserve_api.job_status import ContinuedFrom
from coserve_api.uris import ARTIFACTS_ROOT, artifact_uri, model_path, parse_uri, relative_path
from coserve_contract.messages import AdapterRecord, Checkpoint, Start
from coserve_contract.told import start_at

_CHECKPOINT = re.compile(r"jobs/[^/]+/e([0-9]+)/s([0-9]+)")


def is_uri(source: str) -> bool:
    """Return whether `adapter.from` is a URI; else it is the name of a published adapter."""
    return "://" in source


def continued_from(
    job: FinetuneJob,
    endpoint: InferenceEndpoint,
    published: Mapping[str, AdapterRecord],
    left: Callable[[str], ContinuedFrom | None] = lambda _: None,
) -> ContinuedFrom | None:
    """Return what the job goes on from: what was chosen at its first binding, else what is there now; `left` says which
    checkpoint a job of that name has left. None where it begins anew, or what it names is not there (yet).
    """
    source, resumed = job.spec.adapter.source, job.spec.resume_from
    if job.status.continued_from is not None:
        return job.status.continued_from
    if resumed is not None and resumed.uri is not None:
        return ContinuedFrom(uri=resumed.uri.rstrip("/"), sha256=resumed.sha256)
    if resumed is not None:
        return None if resumed.job is None else left(resumed.job)
    if source is None:
        return None
    if is_uri(source):
        return ContinuedFrom(uri=source)
    found = published.get(source)
    if found is None:
        return None
    uri = artifact_uri(endpoint.spec.artifact_store.uri, found.path)
    return ContinuedFrom(uri=uri, version=found.number, sha256=found.sha256)


def checkpoint_left(job: FinetuneJob) -> ContinuedFrom | None:
    """Return the last checkpoint of a job that is over."""
    last = job.status.checkpoint if job.status.completion_time is not None else None
    return None if last is None else ContinuedFrom(uri=last.uri, sha256=last.sha256)


def checkpoint_of(job: FinetuneJob, endpoint: InferenceEndpoint, found: ContinuedFrom | None) -> Checkpoint | None:
    """Return the checkpoint that `found` is, where the job resumes from one; None also where no agent can read it."""
    if job.spec.resume_from is None or found is None or found.sha256 is None:
        return None
    try:
        path = relative_path(endpoint.spec.artifact_store.uri, found.uri)
    except InvalidValueError:
        return None
    match = _CHECKPOINT.fullmatch(path)
    if match is None:
        return None
    step = int(match[2])
    return Checkpoint(step=step, cursor=step, epoch=int(match[1]), path=path, sha256=found.sha256)


def elsewhere(job: FinetuneJob, endpoint: InferenceEndpoint) -> str | None:
    """Return why `resumeFrom.uri` is of no use on this endpoint, if it is not."""
    uri = None if job.spec.resume_from is None else job.spec.resume_from.uri
    if uri is None or checkpoint_of(job, endpoint, continued_from(job, endpoint, {})) is not None:
        return None
    return (
        f"spec.resumeFrom.uri is {uri}, and endpoint {endpoint.metadata.name} has its checkpoints directly below "
        f"{endpoint.spec.artifact_store.uri.rstrip('/')}/jobs: name one of these"
    )


def unreadable(source: str, endpoint: InferenceEndpoint) -> str | None:
    """Return why no agent of the endpoint can read `source`, if it is the URI of a volume that they do not have."""
    if not is_uri(source):
        return None
    claim = parse_uri(source).claim
    there = [parse_uri(uri).claim for uri in (endpoint.spec.model.uri, endpoint.spec.artifact_store.uri)]
    if claim is None or claim in there:
        return None
    named = " and ".join(dict.fromkeys(f"pvc://{one}" for one in there if one is not None)) or "no claim"
    return (
        f"spec.adapter.from is {source}, and agents of endpoint {endpoint.metadata.name} have {named}: copy the folder "
        "there, or name an adapter that is published"
    )


def start_of(job: FinetuneJob, endpoint: InferenceEndpoint, found: ContinuedFrom) -> Start:
    """Return what an agent is told of `found`."""
    return start_at(job.spec, _path(endpoint, found.uri), found.sha256)


def _path(endpoint: InferenceEndpoint, uri: str) -> str:
    """Return the folder below the artifact store, or its path in the pod."""
    store = endpoint.spec.artifact_store.uri
    try:
        return relative_path(store, uri.rstrip("/"))
    except InvalidValueError:
        place = parse_uri(uri)
    if place.claim is None or place.claim != parse_uri(store).claim:
        return model_path(uri)
    return f"{ARTIFACTS_ROOT}/{place.path}".rstrip("/")
