"""Writes the CRDs from the models: `python -m coserve_api.generate [FOLDER]` (default: this repository's crds/).

pydantic's JSON schema becomes a structural schema: references inlined, nullable unions opened, defaults kept in specs
and dropped from statuses. Rules that compare an object with its former self are added here, at the level where a
removal shows too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from coserve_api.common import GROUP, VERSION
from coserve_api.endpoint import EndpointSpec, InferenceEndpoint
from coserve_api.endpoint_status import EndpointStatus
from coserve_api.job import FROZEN, FinetuneJob, JobSpec
from coserve_api.job_status import JobStatus

Schema = dict[str, Any]
Column = tuple[str, str, str]  # name, type, path

_INT32_MAX = 2**31 - 1
_KEPT = (
    "type",
    "format",
    "description",
    "enum",
    "default",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
)


def structural_schema(model: type[BaseModel], *, defaults: bool) -> Schema:
    """The structural schema of a model; with `defaults`, the API server fills in what is absent."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}), defaults)


def _convert(node: Schema, definitions: dict[str, Schema], defaults: bool) -> Schema:
    node = _resolved(node, definitions)
    out = {name: node[name] for name in _KEPT if name in node}
    if "description" in out:
        out["description"] = " ".join(out["description"].split())
    if not defaults or out.get("default", 0) in (None, [], {}):
        out.pop("default", None)
    if "x-kubernetes-int-or-string" in node:
        return out | {name: value for name, value in node.items() if name.startswith("x-kubernetes-")}
    if out["type"] == "integer":
        out["format"] = "int32" if out.get("maximum", _INT32_MAX + 1) <= _INT32_MAX else "int64"
    out |= {name: value for name, value in node.items() if name.startswith("x-kubernetes-")}
    if "items" in node:
        out["items"] = _convert(node["items"], definitions, defaults)
    if isinstance(node.get("additionalProperties"), dict) and "x-kubernetes-preserve-unknown-fields" not in node:
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions, defaults)
    if "properties" in node:
        out["properties"] = {
            name: _property(child, name in node.get("required", ()), definitions, defaults)
            for name, child in node["properties"].items()
        }
    return out


def _property(node: Schema, required: bool, definitions: dict[str, Schema], defaults: bool) -> Schema:
    out = _convert(node, definitions, defaults)
    optional = any(option.get("type") == "null" for option in node.get("anyOf", ()))
    if defaults and not required and not optional and _fills_in(out):
        out = {"default": {}, **out}  # defaults inside apply only where the object itself exists
    return out


def _fills_in(schema: Schema) -> bool:
    """Whether a default below would apply to an empty object."""
    return any("default" in child for child in schema.get("properties", {}).values())


def _resolved(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Follow a reference, or the one branch of `X | None`; what the place says goes before what the type says."""
    if "x-kubernetes-int-or-string" in node:
        return node
    branches = [branch for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
    if branches:
        (target,) = branches
    elif "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
    else:
        return node
    here = {name: value for name, value in node.items() if name not in ("anyOf", "$ref")}
    return {**_resolved(target, definitions), **here}


def _name_rules(pattern: str, remedy: str) -> list[Schema]:
    return [{"rule": f"self.metadata.name.matches('{pattern}')", "message": remedy, "fieldPath": ".metadata.name"}]


def frozen_once_started(fields: Sequence[str]) -> list[Schema]:
    """Rules for fields of a FinetuneJob's spec. A field that is in neither is the same: else an optional one could not
    be added, since no status of a job that had started before could be written any more.
    """
    return [
        {
            "rule": "!has(oldSelf.status) || !has(oldSelf.status.startTime)"
            f" || (has(self.spec.{field}) == has(oldSelf.spec.{field})"
            f" && (!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field}))",
            "message": f"{field} is immutable once the job has started (it has a startTime): create another job",
            "fieldPath": f".spec.{field}",
        }
        for field in fields
    ]


def custom_resource_definition(
    kind: type[BaseModel],
    spec: type[BaseModel],
    status: type[BaseModel],
    *,
    plural: str,
    short: str,
    columns: Sequence[Column],
    rules: list[Schema],
    scale: bool,
) -> Schema:
    """The whole CRD of one kind."""
    subresources: Schema = {"status": {}}
    if scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    schema = {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").split()),
        "required": ["metadata", "spec"],
        "x-kubernetes-validations": rules,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 52}}},
            "spec": structural_schema(spec, defaults=True),
            # an older CRD keeps what a newer operator has written, and this one what the next will write
            "status": structural_schema(status, defaults=False) | {"x-kubernetes-preserve-unknown-fields": True},
        },
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": subresources,
        "additionalPrinterColumns": [{"name": name, "type": type_, "jsonPath": path} for name, type_, path in columns],
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.__name__,
                "listKind": f"{kind.__name__}List",
                "plural": plural,
                "singular": kind.__name__.lower(),
                "shortNames": [short],
                "categories": ["coserve"],
            },
            "versions": [version],
        },
    }


def _condition(type_: str, what: str) -> str:
    return f'.status.conditions[?(@.type=="{type_}")].{what}'


_AGE = ("Age", "date", ".metadata.creationTimestamp")


def definitions() -> dict[str, Schema]:
    """File name -> CRD."""
    endpoints = custom_resource_definition(
        InferenceEndpoint,
        EndpointSpec,
        EndpointStatus,
        plural="inferenceendpoints",
        short="iep",
        columns=(
            ("Ready", "string", _condition("Ready", "status")),
            ("Reason", "string", _condition("Ready", "reason")),
            ("Replicas", "integer", ".status.replicas"),
            ("SLO%", "integer", ".status.slo.attainmentPercent"),
            ("Jobs", "integer", ".status.jobs"),
            _AGE,
        ),
        rules=_name_rules(
            "^[a-z]([-a-z0-9]*[a-z0-9])?$",
            "the endpoint's name becomes its Service's: begin with a letter and use only a-z, 0-9 and -",
        ),
        scale=True,
    )
    jobs = custom_resource_definition(
        FinetuneJob,
        JobSpec,
        JobStatus,
        plural="finetunejobs",
        short="ftj",
        columns=(
            ("State", "string", ".status.state"),
            ("Reason", "string", ".status.reason"),
            ("Endpoint", "string", ".spec.endpointRef.name"),
            ("Progress", "integer", ".status.progress.percent"),
            ("Loss", "string", ".status.progress.loss"),
            ("ETA", "string", ".status.progress.eta"),
            ("Adapter", "string", ".status.adapter.name"),
            _AGE,
        ),
        rules=[
            *_name_rules(
                "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
                "the job's name becomes its feeder's: use only a-z, 0-9 and -, a letter or digit at both ends",
            ),
            *frozen_once_started(FROZEN),
        ],
        scale=False,
    )
    return {"inferenceendpoints.yaml": endpoints, "finetunejobs.yaml": jobs}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that begins like a number: kubectl reads `2e-4` as one, and PyYAML would leave it bare."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if text[:1] in set("0123456789+-.") else None
    )


_Dumper.add_representer(str, _represent)


def render(definition: Schema) -> str:
    """The CRD as it lies in the repository."""
    head = "# Generated from coserve_api by `python -m coserve_api.generate`; change the models, not this file.\n"
    return head + yaml.dump(definition, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def main() -> None:
    """Write the CRDs into the folder named on the command line, or beside this package."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    for name, definition in definitions().items():
        (folder / name).write_text(render(definition))


if __name__ == "__main__":
    main()
