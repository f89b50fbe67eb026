"""Every keyword of a schema is enforced or refused by its path; none is dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coserve_engine.errors import RequestError
from coserve_engine.grammar.schema import ANNOTATIONS, MOST_DEPTH, Schema

TEXT = {"type": "string"}


def refusal(document: Any) -> str:
    with pytest.raises(RequestError) as error:
        Schema(document if isinstance(document, str) else json.dumps(document))
    assert (error.value.code, error.value.field) == ("invalid_parameter", "grammar")
    return str(error.value)


UNSUPPORTED = (
    *("not", "if", "then", "else", "dependencies", "dependentSchemas", "dependentRequired", "uniqueItems", "contains"),
    *("minContains", "maxContains", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "additionalItems"),
    *("$anchor", "$dynamicRef", "$recursiveRef", "contentSchema", "nullable", "x-guidance", "minLenght", "id"),
)
"""Of JSON Schema, of OpenAPI, of llguidance, and a slip."""


@pytest.mark.parametrize("keyword", UNSUPPORTED)
@pytest.mark.parametrize("draft", [None, "http://json-schema.org/draft-04/schema#"])
def test_a_keyword_that_is_not_enforced_is_refused_by_its_path(keyword: str, draft: str | None) -> None:
    document = {"type": "array", "items": {"type": "object", "properties": {"a/b": {"type": "string", keyword: True}}}}
    if draft is not None:
        document["$schema"] = draft
    assert f"#/items/properties/a~1b/{keyword} is a keyword that is not supported" in refusal(document)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"type": "text"}, "#/type is 'text'"),
        ({"type": ["string", 7]}, "#/type"),
        ({"type": []}, "#/type"),
        ({"properties": {"a": 7}}, "#/properties/a is no JSON object"),
        ({"properties": [TEXT]}, "#/properties must be an object"),
        ({"items": [TEXT, TEXT]}, "#/items is an array"),
        ({"anyOf": []}, "#/anyOf must be an array"),
        ({"allOf": {"a": TEXT}}, "#/allOf must be an array"),
        ({"enum": []}, "#/enum"),
        ({"required": "a"}, "#/required"),
        ({"maxLength": -1}, "#/maxLength"),
        ({"maxItems": True}, "#/maxItems"),
        ({"exclusiveMaximum": True, "maximum": 3}, "#/exclusiveMaximum must be a number"),
        ({"pattern": 3}, "#/pattern"),
        ({"format": "hostname-idn"}, "#/format is 'hostname-idn'; the formats that are enforced are date,"),
        ({"minProperties": 2, "required": ["a"]}, "#/minProperties is 2"),
        ({"$ref": "http://example.com/schema"}, "#/$ref is 'http://example.com/schema'"),
        ({"$ref": "#name"}, "#/$ref"),
        ({"$ref": "#/$defs/a"}, "#/$ref refers to #/$defs/a, where no schema is"),
        ({"$ref": "#/title", "title": "a"}, "#/$ref refers to #/title"),
        ({"properties": {"a": {"$id": "http://example.com/other"}}}, "#/properties/a/$id"),
        (True, "# is no JSON object"),
        ([], "# is no JSON object"),
        ("", "cannot be read"),
        ('{"type": "string", "type": "integer"}', "'type' stands twice"),
        ('{"minimum": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(document: Any, said: str) -> None:
    assert said in refusal(document)


def test_annotations_are_taken_and_go_no_further() -> None:
    document = {"$id": "http://example.com/me", "properties": {"title": {**dict.fromkeys(ANNOTATIONS, "x"), **TEXT}}}
    taken = Schema(json.dumps(document | {"x-order": [1], "$comment": "why"})).document()
    assert taken == {"$defs": {"root": {"properties": {"title": TEXT}}}, "$ref": "#/$defs/root"}


def test_references_are_those_of_the_document_wherever_it_lies() -> None:
    document = {
        "$ref": "#/properties/a~1b",
        "properties": {"a/b": {"anyOf": [{"$ref": "#"}, {"$ref": "#/definitions/x%20y"}]}},
        "definitions": {"x y": TEXT},
    }
    taken = Schema(json.dumps(document)).document(("properties", "a/b"))
    assert taken["$ref"] == "#/$defs/root/properties/a~1b"
    assert taken["$defs"]["root"]["properties"]["a/b"]["anyOf"] == [
        {"$ref": "#/$defs/root"},
        {"$ref": "#/$defs/root/definitions/x%20y"},
    ]


def nested(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = TEXT
    for _ in range(levels):
        document = {"anyOf": [document]}
    return document


def chain(links: int) -> dict[str, Any]:
    """The compiler goes through all of it, though no definition is deep."""
    links_ = {f"l{n}": {"items": {"$ref": f"#/$defs/l{n + 1}"}} for n in range(links)}
    return {"$ref": "#/$defs/l0", "$defs": {**links_, f"l{links}": TEXT}}


def test_depth_is_bounded_with_references_followed() -> None:
    Schema(json.dumps(nested(MOST_DEPTH // 2 - 1)))
    Schema(json.dumps(chain(MOST_DEPTH // 2 - 2)))
    assert "levels deep" in refusal(nested(MOST_DEPTH))
    assert "levels deep by references" in refusal(chain(MOST_DEPTH))
    assert "levels deep by references" in refusal(chain(5000))


def test_a_schema_that_contains_itself_has_an_end() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/$defs/leaf"}}}
    Schema(json.dumps(tree | {"$defs": {"leaf": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#"}, TEXT]}}}))


def union(*tags: object, **more: Any) -> dict[str, Any]:
    """As pydantic writes one with a discriminator."""

    def one(tag: object) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": tag}}, "required": ["kind"], **more}

    refs = [{"$ref": f"#/$defs/a~1{n}"} for n in range(len(tags))]
    return {"items": {"oneOf": refs}, "$defs": {f"a/{n}": one(tag) for n, tag in enumerate(tags)}}


@pytest.mark.parametrize(
    ("document", "exclusive"),
    [
        (union("a", "b", "c"), True),
        ({"type": "string"}, True),
        (union("a", "b", "a"), False),
        (union("a", 1), False),
        (union(1, 1.0), False),
        (union("a", "b", required=[]), False),
        (union("a", "b", type=["object", "null"]), False),
        (union("a", "b", properties={"kind": True}), False),
        ({"oneOf": [{"$ref": "#/oneOf/1"}, {"type": "string"}]}, False),
        ({"oneOf": [True, {"type": "object"}]}, False),
        ({"$defs": {"unused": {"oneOf": [{"$ref": "#/title"}]}}}, False),
        ({"oneOf": [union("a")["$defs"]["a/0"], union("b")["$defs"]["a/0"]]}, True),
    ],
    ids=str,
)
def test_schemas_of_a_union_are_told_apart_by_a_name(document: dict[str, Any], exclusive: bool) -> None:
    """Then oneOf means what anyOf does, and only then."""
    assert Schema(json.dumps(document)).exclusive == exclusive
