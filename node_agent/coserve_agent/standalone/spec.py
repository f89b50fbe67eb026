"""What a standalone job is: a FinetuneJob's spec, under the same names, so that it moves to a cluster as it is. Only
where its data lie differs, and the endpoint goes without saying.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.standalone.paths import LocalUri
from coserve_api.common import Subdomain
from coserve_api.job import Dataset, EndpointRef, Evaluation, JobSpec

INVALID = "invalid_value"


class LocalDataset(Dataset):
    """Of files of this machine."""

    uri: LocalUri


class LocalEvaluation(Evaluation):
    """The held-out samples may have a file of their own."""

    uri: LocalUri | None = None


class LocalJobSpec(JobSpec):
    """A job's spec. There is one endpoint here, whatever `endpointRef` says."""

    endpoint_ref: EndpointRef = Field(default_factory=lambda: EndpointRef(name="local"))
    dataset: LocalDataset
    evaluation: LocalEvaluation = Field(default_factory=LocalEvaluation)


class JobRequest(BaseModel):
    """The body of POST /v1/finetune_jobs."""

    name: Subdomain | None = None
    spec: LocalJobSpec


def parse_job(body: Mapping[str, Any]) -> JobRequest:
    """The request in `body`.

    Raises:
        ApiError: 400 that names the field, its value and the remedy.
    """
    _check_known(body, JobRequest, "")
    try:
        return JobRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "string_type":
            what = "write it as a string, in quotes"
        if first["type"] == "missing":
            raise bad_request(f"{field} is missing: set it", field, INVALID) from None
        shown = "" if isinstance(first["input"], dict) else f" is {repr(first['input'])[:120]}"
        raise bad_request(f"{field}{shown}: {what}", field, INVALID) from None


def _check_known(body: Mapping[str, Any], model: type[BaseModel], where: str) -> None:
    """Nothing is dropped in silence: an API server with the resource's definition would refuse it, too."""
    known = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for name, value in body.items():
        field = f"{where}{name}"
        if name not in known:
            raise unknown(field, sorted(known))
        for part in _models_in(known[name]):
            if isinstance(value, dict):
                _check_known(value, part, f"{field}.")


def unknown(field: str, known: list[str]) -> ApiError:
    return bad_request(f"{field} is unknown: leave it out; there are {', '.join(known)}", field, "unknown_parameter")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
