"""What a FinetuneJob says of the checkpoint that it goes on from."""

from __future__ import annotations

from pydantic import ConfigDict, model_validator

from coserve_api.common import Label, Sha256, SpecModel
from coserve_api.errors import InvalidValueError
from coserve_api.uris import CheckpointUri

_ONE_CHECKPOINT = "set job, or uri and sha256 of a checkpoint as its job's status.checkpoint had them"


class ResumeFrom(SpecModel):
    """The checkpoint of another job of the same endpoint: its last one, or the one at a URI."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "has(self.job) != has(self.uri) && has(self.uri) == has(self.sha256)",
                    "message": _ONE_CHECKPOINT,
                }
            ]
        }
    )

    job: Label | None = None
    """The name of a FinetuneJob that is Complete or Failed, whose last accepted checkpoint is meant."""
    uri: CheckpointUri | None = None
    """A checkpoint's folder below the endpoint's artifact store, as status.checkpoint.uri of its job has it; the job
    may be gone.
    """
    sha256: Sha256 | None = None
    """What status.checkpoint.sha256 had: the checksum of its manifest.json."""

    @model_validator(mode="after")
    def _one_checkpoint(self) -> ResumeFrom:
        if (self.job is None) == (self.uri is None) or (self.uri is None) != (self.sha256 is None):
            raise InvalidValueError(_ONE_CHECKPOINT)
        return self
