"""Whether an endpoint's artifact store lies inside another's, or around it: then what one collects may be the other's.

Two endpoints may have the very same store: below it each writes under UIDs alone.
"""

from collections.abc import Iterable

from coserve_api.conditions import find_condition
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.endpoint_status import EndpointCondition
from coserve_api.uris import Location, parse_uri

_Folder = tuple[str | None, ...]
"""Namespace, claim, and the names below."""
TAKEN = "ArtifactStoreTaken"
"""The reason of the condition Ready."""


class Folders:
    """The endpoints by the folder of their store, so that each is compared only with those around its own."""

    def __init__(self) -> None:
        self._at: dict[_Folder, dict[str, InferenceEndpoint]] = {}
        self._below: dict[_Folder, dict[str, InferenceEndpoint]] = {}

    def put(self, endpoint: InferenceEndpoint) -> None:
        """Take an endpoint, or its newer version."""
        folder, uid = _folder(endpoint), endpoint.metadata.uid
        self._at.setdefault(folder, {})[uid] = endpoint
        for above in _above(folder):
            self._below.setdefault(above, {})[uid] = endpoint

    def remove(self, endpoint: InferenceEndpoint) -> None:
        """Drop an endpoint that was put."""
        folder, uid = _folder(endpoint), endpoint.metadata.uid
        for index, key in [(self._at, folder), *((self._below, above) for above in _above(folder))]:
            index[key].pop(uid)
            if not index[key]:
                del index[key]

    def around(self, endpoint: InferenceEndpoint) -> list[InferenceEndpoint]:
        """Return the endpoints whose store may lie inside the endpoint's, or around it."""
        folder = _folder(endpoint)
        found = [self._below.get(folder, {}), *(self._at.get(above, {}) for above in _above(folder))]
        return [other for each in found for other in each.values()]


def overlap(endpoint: InferenceEndpoint, others: Iterable[InferenceEndpoint]) -> str:
    """Return why `endpoint` may not begin, naming the older endpoint whose store overlaps; nothing where none does."""
    for other in sorted(others, key=_age):
        theirs, ours = other.spec.artifact_store.uri, endpoint.spec.artifact_store.uri
        if (
            other.metadata.namespace == endpoint.metadata.namespace
            and _age(other) < _age(endpoint)
            and not _is_refused(other)
            and _nested(parse_uri(theirs), parse_uri(ours))
        ):
            name = other.metadata.name
            return (
                f"spec.artifactStore.uri is {ours}, and that of InferenceEndpoint {name} is {theirs}, so that one lies "
                "in the other: create this endpoint anew with the same or with another folder"
            )
    return ""


def _is_refused(endpoint: InferenceEndpoint) -> bool:
    ready = find_condition(endpoint.status.conditions, EndpointCondition.READY)
    return ready is not None and ready.reason == TAKEN


def _age(endpoint: InferenceEndpoint) -> tuple[str, str]:
    return endpoint.metadata.creation_timestamp or "", endpoint.metadata.uid


def _nested(one: Location, other: Location) -> bool:
    """Return whether one is a folder within the other. Of file:// nothing is known: it depends on the pod's volumes."""
    if one.claim is None or one.claim != other.claim:
        return False
    short, long = sorted((_parts(each) for each in (one, other)), key=len)
    return len(short) < len(long) and long[: len(short)] == short


def _parts(place: Location) -> tuple[str, ...]:
    return tuple(part for part in place.path.split("/") if part)


def _folder(endpoint: InferenceEndpoint) -> _Folder:
    place = parse_uri(endpoint.spec.artifact_store.uri)
    return endpoint.metadata.namespace, place.claim, *_parts(place)


def _above(folder: _Folder) -> Iterable[_Folder]:
    """Return the folders that hold this one, that of the volume itself among them."""
    return (folder[:length] for length in range(2, len(folder)))
