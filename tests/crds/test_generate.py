"""The CRDs in the repository are what the models say, and nothing in them is unbounded or undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coserve_api.generate import definitions, render

ROOT = Path(__file__).parents[2]
FILES = ("inferenceendpoints.yaml", "finetunejobs.yaml")


def walk(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from walk(schema[key], f"{path}[]")


def parts(name: str, *roots: str) -> list[tuple[str, dict[str, Any]]]:
    schema = definitions()[name]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return [found for root in roots for found in walk(schema["properties"][root], root)]


def test_the_files_are_generated_from_the_models() -> None:
    for name, definition in definitions().items():
        assert (ROOT / "crds" / name).read_text() == render(definition), "run python -m coserve_api.generate"


def test_every_file_is_tested() -> None:
    assert set(FILES) == set(definitions()) == {path.name for path in (ROOT / "crds").glob("*.yaml")}


@pytest.mark.parametrize("name", FILES)
def test_everything_is_bounded(name: str) -> None:
    for path, schema in parts(name, "spec", "status"):
        match schema.get("type", "int-or-string"):
            case "string" | "int-or-string":
                assert "maxLength" in schema or "enum" in schema, path
            case "array":
                assert "maxItems" in schema, path
            case "integer":
                assert "minimum" in schema, path
                assert "maximum" in schema or not path.startswith("spec"), path
            case "object":
                assert "properties" in schema or "maxProperties" in schema, path
            case other:
                assert other == "boolean", path


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_described(name: str) -> None:
    for path, schema in parts(name, "spec", "status"):
        if not path.endswith("[]"):
            assert schema.get("description"), path


@pytest.mark.parametrize("name", FILES)
def test_a_status_has_no_defaults(name: str) -> None:
    assert [path for path, schema in parts(name, "status") if "default" in schema] == []


@pytest.mark.parametrize("name", FILES)
def test_conditions_are_a_map_by_type(name: str) -> None:
    schema = dict(parts(name, "status"))["status.conditions"]
    assert schema["x-kubernetes-list-type"] == "map"
    assert schema["x-kubernetes-list-map-keys"] == ["type"]


def test_numbers_in_quotes_stay_strings_for_every_yaml_reader() -> None:
    text = (ROOT / "crds" / "finetunejobs.yaml").read_text()
    assert "default: '2e-4'" in text  # kubectl would read the bare 2e-4 as a number
    assert yaml.safe_load(text) == definitions()["finetunejobs.yaml"]
