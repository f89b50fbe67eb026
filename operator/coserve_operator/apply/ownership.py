"""Which fields of an object are ours, as server-side apply keeps them in metadata.managedFields.

Who changes a field takes it from us, whoever sent the same value does not, and what defaulting and admission webhooks
write within our own request is no loss: so the fields that we had and have no more are those that others changed.
Format: https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management
"""

import json
from collections.abc import Iterator

from coserve_operator.kube import FIELD_MANAGER, Manifest

Fields = frozenset[str]
"""Paths such as spec.template.spec.containers[name=agent].image."""
UNKNOWN_MANAGER = "somebody"


def owned_fields(body: Manifest) -> Fields:
    """Return the fields that our last apply owns of an object as the API server has it; of its status none."""
    return frozenset(path for manager, path in _managed(body) if manager is None)


def taken_by(body: Manifest, lost: Fields) -> str:
    """Return who owns one of these fields now; they may also have been removed, by nobody that is known."""
    return next((manager for manager, path in _managed(body) if manager is not None and path in lost), UNKNOWN_MANAGER)


def _managed(body: Manifest) -> Iterator[tuple[str | None, str]]:
    """Yield (manager, path), None for us."""
    for entry in body["metadata"].get("managedFields") or []:
        if entry.get("subresource"):
            continue
        ours = entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply"
        for path in _paths(entry.get("fieldsV1") or {}, ""):
            yield None if ours else str(entry.get("manager") or UNKNOWN_MANAGER)[:128], path


def _paths(fields: Manifest, prefix: str) -> Iterator[str]:
    """Yield the leaves; a list's element counts as one where nothing below it is named."""
    for key, below in fields.items():
        if key == ".":
            continue
        sort, _, name = key.partition(":")
        path = f"{prefix}.{name}".lstrip(".") if sort == "f" else f"{prefix}[{_element(sort, name)}]"
        inner = list(_paths(below, path))
        yield from inner or [path]


def _element(sort: str, name: str) -> str:
    if sort != "k":
        return name
    return ",".join(f"{key}={value}" for key, value in json.loads(name).items())
