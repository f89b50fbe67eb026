"""What a random model says under schemas of every kind is valid, by another implementation of JSON Schema."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_driver import Driver, FakeClock
from grammars import END, schema
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_models import CONTEXT

from coserve_engine.config import EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.grammar.schema import Schema
from coserve_engine.grammar.vocabulary import read_vocabulary
from coserve_engine.messages import AddRequest, FinishReason, RequestFailed, SamplingParams, TokenBatch

VOCAB = 320
FORMATS = jsonschema.FormatChecker(["ipv4", "date"])
NAMES = ("a", "b", "na me", 'q"uote', "é/~", "$ref", "")
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-50, 50) | st.sampled_from([0.5, -2.25, 1e6]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def _numbers(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    if draw(st.booleans()):
        low = draw(st.integers(-30, 30))
        found[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
        if draw(st.booleans()):
            found[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = low + draw(st.integers(2, 40))
    elif draw(st.booleans()):
        found["multipleOf"] = draw(st.sampled_from([3, 7, 25]))
    return found


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    match draw(st.integers(0, 3)):
        case 0:
            return {"type": "string", "pattern": draw(st.sampled_from([r"^[a-z]{1,3}$", r"^\d+-\d+$", "x|yz", "é+"]))}
        case 1:
            return {"type": "string", "format": draw(st.sampled_from(["date", "uuid", "ipv4", "time", "date-time"]))}
    least = draw(st.integers(0, 4))
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 5))}


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def make(draw: st.DrawFn) -> dict[str, Any]:
        least = draw(st.integers(0, 2))
        found: dict[str, Any] = {"type": "array", "items": draw(inner), "maxItems": least + draw(st.integers(0, 2))}
        if least:
            found["minItems"] = least
        if draw(st.booleans()):
            found["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
        return found

    return make()


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def make(draw: st.DrawFn) -> dict[str, Any]:
        properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=3))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        found: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        match draw(st.integers(0, 4)):
            case 0:
                found["additionalProperties"] = draw(inner)
                found["required"] = [*required, draw(st.sampled_from(["other", "é"]))]
            case 1:
                found["patternProperties"] = {"^x[0-9]$": draw(inner)}
                found["additionalProperties"] = False
            case 2:
                found["minProperties"] = len(found["required"])
                found["additionalProperties"] = False
            case _:
                found["additionalProperties"] = False
        return found

    return make()


def _tagged(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """As pydantic writes a discriminated union."""

    def one(kind: str, value: Any) -> dict[str, Any]:
        properties = {"kind": {"const": kind, "title": "Kind", "type": "string"}, "value": value}
        return {
            "type": "object",
            "properties": properties,
            "required": ["kind", "value"],
            "additionalProperties": False,
        }

    return st.tuples(inner, inner).map(
        lambda two: {"oneOf": [one("a", two[0]), one("b", two[1])], "discriminator": {"propertyName": "kind"}}
    )


_LEAVES = (
    st.just({"type": "boolean"})
    | st.just({"type": "null"})
    | st.just({"type": ["integer", "null"]})
    | st.lists(_VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values})
    | _VALUES.map(lambda value: {"const": value, "description": "only this"})
    | _numbers()
    | _strings()
    | st.just({"$ref": "#/$defs/short"})
    | st.just({"allOf": [{"$ref": "#/$defs/short"}, {"type": "string", "minLength": 1}]})
)
_PARTS = st.recursive(
    _LEAVES,
    lambda inner: (
        _arrays(inner)
        | _objects(inner)
        | _tagged(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    ),
    max_leaves=5,
)
_TREE = {
    "type": "object",
    "properties": {"value": {"$ref": "#/$defs/short"}, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["value", "below"],
    "additionalProperties": False,
}
SCHEMAS = (_PARTS | st.just({"$ref": "#/$defs/tree"})).map(
    lambda part: {"$defs": {"short": {"type": "string", "maxLength": 5}, "tree": _TREE}, **part}
)


def engine(folder: Path) -> Engine:
    settings = {"max_model_length": CONTEXT, "kv_cache_bytes": 1 << 20, "threads": 1, "finetuning": False}
    return Engine(EngineConfig(str(folder), **settings), FakeClock())


def check(engine: Engine, folder: Path, examples: int, *, same: bool = False) -> Counter[FinishReason]:
    """That answers are valid; how they ended. With `same` each run tries the same schemas."""
    tokens = read_vocabulary(folder, VOCAB).tokens
    closing = {b'"': 5.0, b"}": 4.0, b"]": 4.0, b",": -2.0, b" ": -3.0, b"\n": -3.0, b"\t": -3.0, b"\r": -3.0}
    bias = tuple((tokens.index(token), value) for token, value in closing.items())
    ended = Counter[FinishReason]()

    @settings(max_examples=examples, phases=[Phase.generate], derandomize=same)
    @given(SCHEMAS)
    def valid(document: dict[str, Any]) -> None:
        jsonschema.Draft202012Validator.check_schema(document)
        reference = jsonschema.Draft202012Validator(document, format_checker=FORMATS)
        d = Driver(engine, FakeClock())
        for n in range(3):
            params = SamplingParams(180, 1.0, seed=n, logit_bias=bias, grammar=schema(document))
            d.submit(AddRequest(f"r{n}", (9 + n, 10), params, 0.0))
        d.run()
        assert not d.of(RequestFailed)
        said = [token for batch in d.of(TokenBatch) for token in batch.tokens]
        for last in (token for token in said if token.finish):
            ended[last.finish] += 1
            if last.finish is FinishReason.STOP:
                assert last.token == END
                spoken = [one.token for one in said if one.request_id == last.request_id and not one.finish]
                reference.validate(json.loads(b"".join(tokens[token] for token in spoken).decode()))

    valid()
    return ended


def test_answers_are_valid(folder: Path) -> None:
    ended = check(engine(folder), folder, 60)
    assert ended[FinishReason.STOP] > 0.8 * ended.total()


@pytest.mark.parametrize("keyword", ["maxLength", "required", "maxItems", "additionalProperties"])
def test_a_keyword_that_was_dropped_would_be_found(folder: Path, monkeypatch: pytest.MonkeyPatch, keyword: str) -> None:
    """The control."""

    def without(part: Any) -> Any:
        if isinstance(part, list):
            return [without(one) for one in part]
        if not isinstance(part, dict):
            return part
        return {name: without(value) for name, value in part.items() if name != keyword}

    document = Schema.document
    monkeypatch.setattr(Schema, "document", lambda self, place=(): without(document(self, place)))
    with pytest.raises(jsonschema.ValidationError):
        check(engine(folder), folder, 400, same=True)
