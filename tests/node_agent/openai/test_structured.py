"""Structured output over HTTP: each field that asks for it, and what else a request may say beside it.
A random model answers, so what is valid was held to the grammar; without one its text never parses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest
from structured_requests import CHAT, SCHEMA, json_schema

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
def test_nulls_and_words_like_those_of_the_request_are_the_schemas_own(
    client: openai.OpenAI, ending: dict[str, int], schema: Any
) -> None:
    """What is null in a request is not there; what is null in a schema is."""
    document = {
        "type": "object",
        "properties": {"schema": {"const": None}, "json": {"enum": [None]}, "any": {"default": None, "const": 1.0}},
        "required": ["schema", "json", "any"],
        "additionalProperties": False,
    }
    body = {"guided_json": document if schema else json.dumps(document)}
    ((text, _),) = whole(client, True, body, seed=4, logit_bias=ending)
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
