"""The adapters of an endpoint: what its spec says of them, and what its status keeps."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from coserve_api.common import Label, SpecModel, StatusModel

MAX_ADAPTERS = 512
"""Names that an endpoint can have."""
MAX_OLDER = 4
"""Versions of a name that status keeps beside the newest."""
PUBLISHER = "coserve.dev/publisher"
"""Annotation of a FinetuneJob: who creates it. It says the truth where the chart's admission policy holds."""
Publisher = Annotated[str, Field(max_length=512)]
Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
FolderUri = Annotated[str, Field(max_length=1600)]
Checksum = Annotated[str, Field(max_length=64)]
JobUid = Annotated[str, Field(max_length=64)]
PublishedRank = Annotated[int, Field(ge=0, le=256)]


class AdapterState(StrEnum):
    PRESENT = "Present"
    ABSENT = "Absent"


class AdapterOverride(SpecModel):
    """What is served under a name where that is not to be the newest published version."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "!has(self.uri)",
                    "message": "uri is reserved: leave it out; an adapter from elsewhere is published by a FinetuneJob "
                    "whose spec.adapter.from names its folder",
                    "fieldPath": ".uri",
                }
            ]
        }
    )

    name: Label
    """The adapter's name, published already or not."""
    version: Version | None = None
    """Serve this version, whatever is published later. Unset: the newest."""
    state: AdapterState = AdapterState.PRESENT
    """Present, or Absent: no version is served under the name; all stay in the artifact store."""
    publisher: Publisher | None = None
    """To whom the name belongs from now on, as the annotation coserve.dev/publisher of their FinetuneJobs says it;
    while it is "", everybody may publish under the name. Unset: to who published first."""
    uri: Annotated[str, Field(max_length=1024)] | None = None
    """Reserved; must not be set."""


class AdapterVersion(StatusModel):
    """A published version that is not the newest, and can be gone back to."""

    version: Annotated[int, Field(ge=1)]
    """Its number."""
    uri: FolderUri = ""
    """Its PEFT folder."""
    sha256: Checksum = ""
    """Checksum of its manifest.json."""
    rank: PublishedRank = 0
    """Its rank."""
    job_uid: JobUid = ""
    """UID of the FinetuneJob that made it."""


class AdapterStatus(StatusModel):
    """A published adapter: enough, without Redis and after its job is gone, to go on serving it."""

    name: Annotated[str, Field(max_length=63)]
    """What clients give as `model`."""
    version: Annotated[int, Field(ge=1)]
    """The newest published version."""
    served_version: Annotated[int, Field(ge=1)] | None = None
    """The version that agents are to serve; absent where spec.adapters hides the name."""
    ready_agents: Annotated[int, Field(ge=0)] = 0
    """Agents that have the served version loaded."""
    uri: FolderUri = ""
    """The newest version's PEFT folder."""
    sha256: Checksum = ""
    """Checksum of its manifest.json."""
    rank: PublishedRank = 0
    """Its rank."""
    job_uid: JobUid = ""
    """UID of the FinetuneJob that made it."""
    publisher: Publisher = ""
    """To whom the name belongs: jobs of others wait. Empty: to nobody."""
    older: Annotated[
        tuple[AdapterVersion, ...],
        Field(
            max_length=MAX_OLDER,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["version"]},
        ),
    ] = ()
    """The versions before, newest first; one that is served is kept in any case."""
