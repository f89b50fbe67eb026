"""Structured output over HTTP: each field that asks for it, what is refused, and what else a request may say beside it.
A random model answers, so what is valid was held to the grammar; without one its text never parses.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from small_models import MARKED_TEMPLATE, SPECIAL, write_model

CHAT = [{"role": "user", "content": "the quick brown fox"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", "北京", 'a "b"\\', "tab\t"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20_000_000_000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "nested": {"$ref": "#/$defs/nested"},
    },
    "required": ["city", "count", "tags", "nested"],
    "additionalProperties": False,
    "$defs": {
        "nested": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        | {"additionalProperties": False}
    },
}
PATTERN = r"[a-f]{3}-\d+\.[x-z]"
CHOICES = ["yes", "no", "yes, but", 'a "quoted"\nline\x00', "北京"]
ROOMY = {"model": "base", "max_tokens": 170, "temperature": 1}


def valid(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def matches(text: str) -> None:
    assert re.fullmatch(PATTERN, text)


def chosen(text: str) -> None:
    assert text in CHOICES


def json_schema(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, **more}}


FIELDS: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"response_format": {"type": "json_object"}}, is_object),
    ({"response_format": json_schema()}, valid),
    ({"response_format": json_schema(strict=True, description="where")}, valid),
    ({"response_format": json_schema(strict=False)}, valid),
    ({"structured_outputs": {"json": SCHEMA, "regex": None, "disable_any_whitespace": False}}, valid),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, valid),
    ({"structured_outputs": {"regex": PATTERN}}, matches),
    ({"structured_outputs": {"choice": CHOICES}}, chosen),
    ({"structured_outputs": {"json_object": True}}, is_object),
    ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, valid),
    ({"guided_json": json.dumps(SCHEMA, ensure_ascii=False)}, valid),
    ({"guided_regex": PATTERN}, matches),
    ({"guided_choice": CHOICES, "structured_outputs": None}, chosen),
]
BOTH = [
    pytest.param(chat, *field, id=f"{'chat' if chat else 'completion'}-{next(iter(field[0]))}-{field[1].__name__}-{n}")
    for chat, fields in ((True, FIELDS), (False, FIELDS[::3]))
    for n, field in enumerate(fields)
]


@pytest.fixture(scope="module")
def ending(served: Any) -> dict[str, int]:
    """A bias by which a random model closes what it opens."""
    likes = {b'"': 5, b"}": 5, b"]": 4, b",": -2, b".": 2} | dict.fromkeys((b" ", b"\n", b"\t", b"\r"), -8)
    pieces = served.agent.tokenizer.pieces
    return {str(token): likes[text] for token in range(4, 320) if (text := pieces.bytes_of(token)) in likes}


def whole(client: openai.OpenAI, chat: bool, body: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """Of each choice its text, and why it ended."""
    if chat:
        answer = client.chat.completions.create(messages=CHAT, extra_body=body, **ROOMY | options)
        return [(choice.message.content, choice.finish_reason) for choice in answer.choices]
    text = client.completions.create(prompt="one two", extra_body=body, **ROOMY | options)
    return [(choice.text, choice.finish_reason) for choice in text.choices]


def refused(http: httpx.Client, body: dict[str, Any], chat: bool = True) -> dict[str, Any]:
    path, said = ("chat/completions", {"messages": CHAT}) if chat else ("completions", {"prompt": "one"})
    answer = http.post(f"/v1/{path}", json={"model": "base", "max_tokens": 9, **said, **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


# ---- what is asked for is kept ----


@pytest.mark.parametrize(("chat", "body", "check"), BOTH)
def test_each_field_is_kept_whole_and_streamed(
    client: openai.OpenAI, ending: dict[str, int], chat: bool, body: dict[str, Any], check: Callable[[str], None]
) -> None:
    """Streams as whole answers (vllm#10376), and completions as chats (vllm#57726)."""
    options = {"seed": 4, "logit_bias": ending}
    ((text, finish),) = whole(client, chat, body, **options)
    assert finish == "stop"
    check(text)
    if chat:
        chunks = client.chat.completions.create(messages=CHAT, stream=True, extra_body=body, **ROOMY | options)
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    else:
        streamed = client.completions.create(prompt="one two", stream=True, extra_body=body, **ROOMY | options)
        parts = [chunk.choices[0].text for chunk in streamed]
    assert "".join(parts) == text


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}], ids=str)
def test_what_is_not_asked_for_does_not_come(
    client: openai.OpenAI, ending: dict[str, int], body: dict[str, Any]
) -> None:
    """The control."""
    for text, _ in whole(client, True, body, seed=4, logit_bias=ending, n=3, max_tokens=60):
        for check in (is_object, valid, matches, chosen):
            with pytest.raises((ValueError, AssertionError)):
                check(text)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_each_of_several_choices_has_a_place_of_its_own(
    client: openai.OpenAI, ending: dict[str, int], chat: bool
) -> None:
    body = {"response_format": json_schema()}
    together = whole(client, chat, body, seed=10, n=3, logit_bias=ending)
    assert len({text for text, _ in together}) > 1
    for n, (text, finish) in enumerate(together):
        assert finish == "stop"
        valid(text)
        assert [(text, finish)] == whole(client, chat, body, seed=10 + n, logit_bias=ending)


def test_prompts_of_a_list_are_each_held(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=["one", "two", "three"], extra_body={"guided_choice": CHOICES}, **ROOMY)
    assert len(answer.choices) == 3
    for choice in answer.choices:
        chosen(choice.text)


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_bytes_come_whole(client: openai.OpenAI, stream: bool) -> None:
    """Line ends of Unicode in a stream's event included."""
    body = {"guided_regex": "[好😀é\u2028\x85]{12}"}
    answer = client.completions.create(prompt="one", seed=3, stream=stream, extra_body=body, **ROOMY)
    parts = [chunk.choices[0].text for chunk in (answer if stream else [answer])]
    assert re.fullmatch(body["guided_regex"], "".join(parts))
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("schema", [True, {}], ids=str)
def test_nulls_and_words_like_those_of_the_request_are_the_schemas_own(client: openai.OpenAI, schema: Any) -> None:
    """What is null in a request is not there; what is null in a schema is."""
    document = {
        "type": "object",
        "properties": {"schema": {"const": None}, "json": {"enum": [None]}, "any": {"default": None, "const": 1.0}},
        "required": ["schema", "json", "any"],
        "additionalProperties": False,
    }
    ((text, _),) = whole(client, True, {"guided_json": document if schema else json.dumps(document)})
    assert json.loads(text) == {"schema": None, "json": None, "any": 1}


# ---- beside other parameters ----


def test_an_answer_that_is_cut_is_the_beginning_of_a_valid_one(client: openai.OpenAI, ending: dict[str, int]) -> None:
    body, options = {"response_format": json_schema()}, {"seed": 4, "logit_bias": ending}
    ((text, _),) = whole(client, True, body, **options)
    for tokens in (1, 2, 5, 9, 14, 20):
        ((cut, finish),) = whole(client, True, body, **options, max_tokens=tokens)
        assert finish == "length"
        assert text.startswith(cut.rstrip("\ufffd"))


def test_a_stop_string_cuts_as_it_does_elsewhere(client: openai.OpenAI, ending: dict[str, int]) -> None:
    body, options = {"guided_json": SCHEMA}, {"seed": 4, "logit_bias": ending}
    ((text, _),) = whole(client, True, body, **options)
    ((cut, finish),) = whole(client, True, body, **options, stop='"count"')
    assert (cut, finish) == (text[: text.index('"count"')], "stop")


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 60}], ids=str)
def test_an_answer_ends_where_nothing_may_follow(client: openai.OpenAI, more: dict[str, Any]) -> None:
    ((text, finish),) = whole(client, True, {"guided_choice": ["yes", "no"], **more})
    assert text in ("yes", "no")
    assert finish == "stop"


def test_an_end_is_put_off_where_something_may(client: openai.OpenAI) -> None:
    ((text, finish),) = whole(client, False, {"guided_regex": "a+", "ignore_eos": True}, max_tokens=20)
    assert re.fullmatch("a{20,}", text)
    assert finish == "length"
    ((text, _),) = whole(client, False, {"guided_regex": "a+", "min_tokens": 9}, logit_bias={"3": 100})
    assert re.fullmatch("a{9,}", text)


def test_a_stop_token_ends_a_whole_answer_alone(client: openai.OpenAI, served: Any) -> None:
    """`a` is among the answer's tokens and would end it."""
    (token,) = served.agent.tokenizer.encode("a")
    body = {"guided_regex": "(bab)+", "stop_token_ids": [token]}
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, False, body)
    assert caught.value.param == "guided_regex"
    assert "stop_token_ids" in str(caught.value)
    assert whole(client, False, body | {"guided_regex": "bb?"})[0][1] == "stop"


def test_log_probabilities_are_the_free_models(client: openai.OpenAI) -> None:
    """The first token of both follows the same prompt: the model's opinion of it is the same."""
    options: dict[str, Any] = {"messages": CHAT, "logprobs": True, "top_logprobs": 5, **ROOMY, "temperature": 0}
    free = client.chat.completions.create(**options | {"max_tokens": 1}).choices[0].logprobs.content
    held = client.chat.completions.create(**options, extra_body={"guided_choice": ["yes"]}).choices[0]
    first = held.logprobs.content[0]
    assert first.top_logprobs == free[0].top_logprobs
    assert first.logprob < min(top.logprob for top in first.top_logprobs), "what is chosen is not what is likely"
    assert bytes(byte for one in held.logprobs.content for byte in one.bytes) == b"yes"


def test_the_prompt_is_none_of_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"prompt": "one two", "echo": True, "logprobs": 0, **ROOMY}
    body = {"guided_choice": ["yes", "no"], "prompt_logprobs": 1}
    held = client.completions.create(**options, extra_body=body).choices[0]
    assert held.text in ("one twoyes", "one twono")
    free = client.completions.create(**options, extra_body={"prompt_logprobs": 1}).choices[0]
    assert held.prompt_logprobs == free.prompt_logprobs
    scored = client.completions.create(**options | {"max_tokens": 0}, extra_body=body).choices[0]
    assert scored.text == "one two"


# ---- what is refused ----

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
