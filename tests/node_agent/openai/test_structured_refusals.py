"""What of structured output is refused over HTTP, and by what name."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_models import MARKED_TEMPLATE, SPECIAL, write_model
from structured_requests import CHAT, SCHEMA, json_schema


def refused(http: httpx.Client, body: dict[str, Any], chat: bool = True) -> dict[str, Any]:
    path, said = ("chat/completions", {"messages": CHAT}) if chat else ("completions", {"prompt": "one"})
    answer = http.post(f"/v1/{path}", json={"model": "base", "max_tokens": 9, **said, **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


WRONG: list[tuple[Any, str]] = [
    ({"response_format": "json_object"}, "response_format is 'json_object'"),
    ({"response_format": {}}, "response_format.type is missing"),
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type is 'structural_tag'"),
    ({"response_format": {"type": "json"}}, "'text', 'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
    ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema is {}"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema is {"),
    ({"response_format": json_schema() | {"type": "json_object"}}, "response_format.json_schema is given"),
    ({"response_format": json_schema() | {"type": "text"}}, "response_format.json_schema is given"),
    ({"response_format": json_schema(None)}, "response_format.json_schema.schema is missing"),
    ({"response_format": json_schema(json.dumps(SCHEMA))}, "response_format.json_schema.schema is '{"),
    ({"response_format": json_schema(name=None)}, "response_format.json_schema.name is missing"),
    ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name is 'a b'"),
    ({"response_format": json_schema(name="a\n")}, "response_format.json_schema.name is 'a\\n'"),
    ({"response_format": json_schema(name="")}, "response_format.json_schema.name is ''"),
    ({"response_format": json_schema(name="a" * 65)}, "response_format.json_schema.name is"),
    ({"response_format": json_schema(strict="yes")}, "response_format.json_schema.strict is 'yes'"),
    ({"response_format": json_schema(shcema={})}, "response_format.json_schema.shcema is {}"),
    ({"structured_outputs": {}}, "structured_outputs says nothing"),
    ({"structured_outputs": {"json": None}}, "structured_outputs says nothing"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs says nothing"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object is 1"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json is 5"),
    ({"structured_outputs": {"json": ""}}, "structured_outputs.json is no JSON Schema (Expecting value"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex is 5"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice is []"),
    ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice is 'yes'"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice.0 is 1"),
    ({"structured_outputs": {"grammar": "root ::= a"}}, "structured_outputs.grammar is 'root ::= a': this is not supp"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag is '{}': this is not supp"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern is ' '"),
    ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, ".disable_any_whitespace is True"),
    ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "l_properties is True"),
    ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices is ['a']"),
    ({"guided_json": [SCHEMA]}, "guided_json is ["),
    ({"guided_json": "{'type': 'object'}"}, "guided_json is no JSON Schema (Expecting property name"),
    ({"guided_json": '{"a": 1, "a": 2}'}, "guided_json is no JSON Schema (field 'a' stands twice"),
    ({"guided_json": '{"const": "\\ud83d"}'}, "guided_json is no JSON Schema (const holds"),
    ({"guided_json": '{"minimum": NaN}'}, "guided_json is no JSON Schema (minimum: NaN"),
    ({"guided_json": "[" * 100_000}, "guided_json is no JSON Schema"),
    ({"guided_regex": None, "guided_choice": {}}, "guided_choice is {}"),
    ({"guided_grammar": "root ::= a"}, "guided_grammar is not supported"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern is not supported"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend is not supported"),
    ({"structural_tag": "{}"}, "structural_tag is not supported"),
    ({"extra_body": {"guided_json": {}}}, "extra_body is no parameter"),
]
"""Without an engine being asked."""


@pytest.mark.parametrize(("body", "said"), WRONG, ids=[str(body)[:70] for body, _ in WRONG])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_what_is_wrong_is_named_by_its_field(http: httpx.Client, body: dict[str, Any], said: str, chat: bool) -> None:
    """Elsewhere such requests are a 500 (vllm#35438), are not held to what they ask for (vllm#33397), or end the
    engine (vllm#45346).
    """
    error = refused(http, body, chat)
    assert said in error["message"]
    assert error["param"] == next(name for name, value in body.items() if value is not None)


ENGINES: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "not-a-type"}, "#/type is 'not-a-type'", ""),
    ({"type": "object", "properties": {"a": 5}}, "#/properties/a is no JSON object", ""),
    ({"$ref": "#/$defs/none"}, "#/$ref refers to #/$defs/none", ""),
    ({"properties": {"a/b": {"uniqueItems": True}}}, "#/properties/a~1b/uniqueItems is a keyword that is not", ""),
    ({"properties": {"a": {"type": "string", "pattern": "(?!a)b"}}}, "#/properties/a", "cannot be compiled"),
    ({"items": [{}]}, "#/items is an array", ""),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "#", "cannot be compiled"),
    ({"$ref": "#"}, "#", ""),
    ({"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "#/items", "use anyOf"),
]
"""A schema, the path that is named, and more that is said."""


@pytest.mark.parametrize(("schema", "path", "more"), ENGINES, ids=[str(schema)[:70] for schema, _, _ in ENGINES])
def test_a_schema_that_is_no_good_is_named_by_its_path(
    http: httpx.Client, schema: dict[str, Any], path: str, more: str
) -> None:
    """Which ends the server elsewhere (vllm#17248), or is a 500 without a word (vllm#57725); so is a pattern that looks
    ahead, as pydantic wrote Decimal's (pydantic#13017).
    """
    for field, body in (
        ("response_format.json_schema.schema", {"response_format": json_schema(schema)}),
        ("structured_outputs.json", {"structured_outputs": {"json": schema}}),
        ("guided_json", {"guided_json": json.dumps(schema)}),
    ):
        for stream in (False, True):
            error = refused(http, {**body, "stream": stream})
            assert error["param"] == next(iter(body))
            assert error["message"].startswith(field), error["message"]
            assert f"the schema's {path}" in error["message"]
            assert more in error["message"]
            assert "grammar" not in error["message"]
    assert http.post("/v1/completions", json={"prompt": "one", "max_tokens": 2}).status_code == 200


def test_a_pattern_that_is_no_good_is_refused(http: httpx.Client) -> None:
    for pattern in ("(", "a{2,1}", "(?=a)", "\\"):
        for field, body in (
            ("guided_regex", {"guided_regex": pattern}),
            ("structured_outputs.regex", {"structured_outputs": {"regex": pattern}}),
        ):
            error = refused(http, body)
            assert error["param"] == next(iter(body))
            assert error["message"].startswith(field)


def test_a_schema_that_is_too_large_or_deep_is_refused(http: httpx.Client) -> None:
    large = {"enum": [f"{number:09}" for number in range(30_000)]}
    error = refused(http, {"guided_json": large, "n": 3})
    assert (error["param"], "262,144" in error["message"]) == ("guided_json", True)
    for levels in (150, 900, 950, 1000):
        for deep, end in (('{"items":', "{}"), ("[", "")):
            text = deep * levels + end + ("}" if end else "]") * levels
            for value in (text, json.dumps(text)):
                body = f'{{"prompt": "one", "guided_json": {value}}}'
                answer = http.post("/v1/completions", content=body)
                assert answer.status_code == 400, (levels, answer.text[:300])


TWO: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, "response_format", "guided_json"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "guided_choice"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json", "structured_outputs.regex"),
    ({"structured_outputs": {"json_object": True}, "guided_regex": "a"}, "structured_outputs.json_object", "guided_re"),
    ({"structured_outputs": {"choice": ["a"]}, "response_format": json_schema()}, ".json_schema.schema", ".choice"),
]


@pytest.mark.parametrize(("body", "one", "other"), TWO, ids=[str(body)[:70] for body, _, _ in TWO])
def test_two_at_once_are_both_named(http: httpx.Client, body: dict[str, Any], one: str, other: str) -> None:
    error = refused(http, body)
    assert one in error["message"]
    assert other in error["message"]
    assert error["param"] in body


def test_what_a_client_got_wrong_breaks_no_promise(http: httpx.Client, served: Any) -> None:
    meter = served.agent.meter
    http.post("/v1/completions", json={"prompt": "one", "max_tokens": 2})
    last = served.call(lambda: meter._samples[-1])
    for body in ({"guided_json": {"type": "text"}}, {"stop_token_ids": [100_000]}):
        refused(http, body)
        assert served.call(lambda: meter._samples[-1]) is last


# ---- models that cannot be held ----


def without_an_end(folder: Path) -> Path:
    """A model that ends no answer, by any of its files."""
    write_model(folder, MARKED_TEMPLATE.replace(SPECIAL[3], "; "))
    for name, field in (("tokenizer_config", "eos_token"), ("config", "eos_token_id")):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    (folder / "generation_config.json").unlink()
    return folder


def test_a_model_that_cannot_be_held_says_so(
    start_agent: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In its log when it starts, and to each who asks; it serves all others."""
    caplog.set_level(logging.INFO, "coserve_agent.agent")
    agent = start_agent(model_path=without_an_end(tmp_path))
    assert re.search("engine: grammar cannot be held to: .*no token that ends an answer", caplog.text)
    with httpx.Client(base_url=agent.url, timeout=60) as http:
        error = refused(http, {"guided_choice": ["yes"]})
        assert error["param"] == "guided_choice"
        assert error["message"].startswith("guided_choice cannot be held to: this model has no token that ends")
        assert http.post("/v1/completions", json={"prompt": "one", "max_tokens": 2}).status_code == 200
    agent.stop()
