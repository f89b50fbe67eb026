"""The adapter that a job goes on from: which folder its `adapter.from` means, and whether the agents can read it."""

from collections.abc import Mapping

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import FinetuneJob, RsloraPolicy
from coserve_api.job_status import ContinuedFrom
from coserve_api.messages import AdapterRecord, Start
from coserve_api.uris import ARTIFACTS_ROOT, artifact_uri, model_path, parse_uri, relative_path


def is_uri(source: str) -> bool:
    """Return whether `adapter.from` is a URI; else it is the name of a published adapter."""
    return "://" in source


def continued_from(
    job: FinetuneJob, endpoint: InferenceEndpoint, published: Mapping[str, AdapterRecord]
) -> ContinuedFrom | None:
    """Return what the job goes on from: what was chosen at its first binding, else what is there now. None where it
    begins anew, or what it names is not published (yet).
    """
    source = job.spec.adapter.source
    if source is None or job.status.continued_from is not None:
        return job.status.continued_from
    if is_uri(source):
        return ContinuedFrom(uri=source)
    found = published.get(source)
    if found is None:
        return None
    uri = artifact_uri(endpoint.spec.artifact_store.uri, found.path)
    return ContinuedFrom(uri=uri, version=found.number, sha256=found.sha256)


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
    adapter = job.spec.adapter
    return Start(
        path=_path(endpoint, found.uri),
        sha256=found.sha256,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=None if adapter.use_rslora is None else adapter.use_rslora is RsloraPolicy.ENABLED,
    )


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
