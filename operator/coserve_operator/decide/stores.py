"""Whether an endpoint's artifact store lies inside another's, or around it: then what one collects may be the other's.

Two endpoints may have the very same store: below it each writes under UIDs alone.
"""

from collections.abc import Iterable

from coserve_api.conditions import find_condition
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.endpoint_status import EndpointCondition
from coserve_api.uris import Location, parse_uri

TAKEN = "ArtifactStoreTaken"
"""The reason of the condition Ready."""


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
    short, long = sorted(([part for part in each.path.split("/") if part] for each in (one, other)), key=len)
    return len(short) < len(long) and long[: len(short)] == short
