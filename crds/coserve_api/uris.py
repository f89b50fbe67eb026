"""Where models, data sets and artifacts lie: `pvc://CLAIM/PATH` or `file:///PATH`, never outside the folder that is
theirs.

A path's segments begin with a letter, digit or underscore, so that `..`, hidden files and option-like names cannot be
written. Those of a data set may hold * and ?, as in a shell, and begin with one; they never stand for a hidden file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from coserve_api.common import LABEL_PATTERN, Text
from coserve_api.errors import InvalidValueError

MODELS_ROOT, DATA_ROOT, ARTIFACTS_ROOT = "/models", "/data", "/artifacts"

_CLAIM = "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_SEGMENT = "[A-Za-z0-9_][A-Za-z0-9._=+@-]*"
_PATH = f"{_SEGMENT}(/{_SEGMENT})*"
_MARKED = _SEGMENT.replace("[A-Za", "[*?A-Za")
_URI = re.compile(
    rf"pvc://(?P<claim>{_CLAIM})(?:/(?P<path>{_MARKED}(?:/{_MARKED})*))?/?|file://(?P<file>(?:/{_MARKED})+)/?"
)


def _text(root: str, segment: str = _SEGMENT, more: str = "") -> Text:
    remedy = (
        f"must be pvc://CLAIM/PATH or file://{root}/PATH, at most 1024 characters; each segment of PATH begins with "
        f"a letter, digit or _{more} and goes on with those or any of . = + @ - (so no '..')"
    )
    return Text(f"pvc://{_CLAIM}(/{segment}(/{segment})*)?/?|file://{root}(/{segment})*/?", 1024, remedy)


ModelUri = Annotated[str, _text(MODELS_ROOT)]
DatasetUri = Annotated[str, _text(DATA_ROOT, _MARKED, ", or the marks * and ?,")]
ArtifactsUri = Annotated[str, _text(ARTIFACTS_ROOT)]
CheckpointUri = Annotated[
    str,
    Text(
        f"(pvc://{_CLAIM}(/{_PATH})?|file:///artifacts(/{_PATH})?)/jobs/{_SEGMENT}/e[1-9][0-9]{{0,14}}/s[0-9]{{1,15}}/?",
        1024,
        "must be the URI of a checkpoint as status.checkpoint.uri has it: the endpoint's artifact store, then "
        "/jobs/UID/eEPOCH/sSTEP",
    ),
]
AdapterSource = Annotated[
    str,
    Text(
        f"{LABEL_PATTERN}|pvc://{_CLAIM}(/{_PATH})?/?|file://(/artifacts|/models)(/{_SEGMENT})*/?",
        1024,
        "must be the name of an adapter that the endpoint has published, or the URI of a PEFT folder that its agents "
        "read: pvc://CLAIM/PATH in the model's or the artifact store's claim, file:///models/PATH or "
        "file:///artifacts/PATH",
    ),
]
RelativePath = Annotated[str, Field(max_length=512, pattern=f"^{_PATH}$")]
"""A path below the artifact store's root, as messages carry it."""
FolderPath = Annotated[str, Field(max_length=1200, pattern=f"^/?{_PATH}$")]
"""A folder that agents can read: below the artifact store's root, or absolute."""


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed URI: `claim` is the PersistentVolumeClaim and `path` relative to its root ("" is the root), or `claim`
    is None and `path` absolute.
    """

    claim: str | None
    path: str


def parse_uri(uri: str) -> Location:
    """The parts of a URI that the API server accepted; InvalidValueError for anything else."""
    match = _URI.fullmatch(uri)
    if match is None or len(uri) > 1024:
        raise InvalidValueError(f"{uri[:200]!r} must be pvc://CLAIM/PATH or file:///PATH without '..'")
    if match["file"] is not None:
        return Location(None, match["file"])
    return Location(match["claim"], match["path"] or "")


def _below(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def model_path(uri: str) -> str:
    """The model's folder in the pod: /models/CLAIM/PATH, or the path of a file URI."""
    place = parse_uri(uri)
    return place.path if place.claim is None else _below(MODELS_ROOT, place.claim, place.path)


def dataset_path(uri: str) -> str:
    """The data set's file, folder or pattern in the pod: /data/CLAIM/PATH, or the path of a file URI."""
    place = parse_uri(uri)
    return place.path if place.claim is None else _below(DATA_ROOT, place.claim, place.path)


def dataset_root(uri: str) -> str:
    """The folder in the pod that no link in the data set may lead out of: the claim's, or /data for a file URI."""
    place = parse_uri(uri)
    return DATA_ROOT if place.claim is None else _below(DATA_ROOT, place.claim)


def artifacts_path(uri: str) -> str:
    """The artifact store's root in the pod: /artifacts/PATH (the claim is mounted at /artifacts), or the path of a file
    URI.
    """
    place = parse_uri(uri)
    return place.path if place.claim is None else _below(ARTIFACTS_ROOT, place.path)


def artifact_uri(store: str, path: str) -> str:
    """The full URI, for a status, of `path` below the artifact store `store`."""
    return store.rstrip("/") + "/" + path


def relative_path(store: str, uri: str) -> str:
    """What `artifact_uri` was given: the path of `uri` below `store`; InvalidValueError when it is not below it."""
    prefix = store.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise InvalidValueError(f"{uri[:200]!r} is not below the artifact store {store!r}")
    return uri.removeprefix(prefix)
