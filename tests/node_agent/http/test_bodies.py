"""What a body may hold: halves of characters, numbers that JSON lacks, fields that are there twice, nulls."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from agent_programs import post

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GOOD = {"model": "base", "messages": CHAT, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "one two", "max_tokens": 2}


# ---- halves of surrogate pairs ----

HALVES = [
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a\\ud83d"}]}', "messages"),
    ("/v1/chat/completions", '{"messages": [{"role": "\\ude00", "content": "a"}]}', "messages"),
    ("/v1/chat/completions", '{"messages": [{"content": [{"type": "text", "text": "\\uDFFF"}]}]}', "messages"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a", "\\ud800": 1}]}', "messages"),
    ("/v1/completions", '{"prompt": "\\ude00\\ud83d"}', "prompt"),
    ("/v1/completions", '{"prompt": "a", "stop": ["x", "\\udead"]}', "stop"),
    ("/v1/completions", '{"prompt": "a", "model": "\\ud83d"}', "model"),
    ("/v1/completions", '{"prompt": "a", "user": "\\uD83D"}', "user"),
    ("/v1/completions", '{"prompt": "a", "metadata": {"deep": [{"\\udbff": 1}]}}', "metadata"),
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"\\udc00": 1}}', "logit_bias"),
    ("/v1/completions", '{"prompt": "a", "\\ud83d": null}', "\\ud83d"),
    ("/tokenize", '{"prompt": "\\ud83d\\ud83d"}', "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), HALVES, ids=[body[:70] for _, body, _ in HALVES])
def test_half_of_a_surrogate_pair_is_refused_anywhere(http: httpx.Client, path: str, body: str, param: str) -> None:
    status, answer = post(http, path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert "half of a surrogate pair" in answer["error"]["message"]
    assert http.get("/v1/models").status_code == 200  # on the same connection


# ---- what is no JSON, or JSON of two meanings ----

NO_NUMBERS = [
    ("/v1/completions", '{"prompt": "a", "temperature": %s}', "temperature", "temperature: "),
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"5": %s}}', "logit_bias", "logit_bias.5: "),
    ("/v1/completions", '{"prompt": "a", "metadata": {"x": [1, {"y": %s}]}}', "metadata", "metadata.x.1.y: "),
    ("/v1/completions", '{"prompt": [1, %s]}', "prompt", "prompt.1: "),
    ("/v1/completions", '{"prompt": "a", "\\ud83d": %s}', "\\ud83d", ""),
    ("/v1/chat/completions", '{"chat_template_kwargs": {"x": %s}}', "chat_template_kwargs", "chat_template_kwargs.x: "),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": %s}]}', "messages", "messages.0.content: "),
    ("/tokenize", '{"prompt": %s}', "prompt", "prompt: "),
    ("/detokenize", '{"tokens": [1, %s]}', "tokens", "tokens.1: "),
]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1.5E+400"])
@pytest.mark.parametrize(("path", "body", "param", "where"), NO_NUMBERS, ids=[body for _, body, _, _ in NO_NUMBERS])
def test_what_json_has_no_number_for_is_refused_anywhere(
    http: httpx.Client, path: str, body: str, param: str, where: str, number: str
) -> None:
    """RFC 8259 has no NaN and no Infinity; Python's parser reads both, and rounds what is too large to the latter."""
    status, answer = post(http, path, body % number)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(where)
    assert number in answer["error"]["message"]


TWICE = [
    ("/v1/completions", '{"prompt": "a", "prompt": "b"}', "prompt"),
    ("/v1/completions", '{"prompt": "a", "max_tokens": 1, "max_tokens": 1}', "max_tokens"),
    ("/v1/completions", '{"prompt": "a", "user": null, "user": "x"}', "user"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "role"),
    ("/v1/chat/completions", '{"chat_template_kwargs": {"x": true, "x": false}}', "x"),
    ("/v1/chat/completions", '{"chat_template_kwargs": {"x": {"\\ud83d": 1, "\\ud83d": 2}}}', "\\ud83d"),
    ("/tokenize", '{"prompt": "a", "prompt": "a"}', "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), TWICE, ids=[body[:70] for _, body, _ in TWICE])
def test_a_field_that_is_there_twice_is_refused(http: httpx.Client, path: str, body: str, param: str) -> None:
    """One of the two would be dropped in silence, as a row's would."""
    status, answer = post(http, path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert "stands twice in one object" in answer["error"]["message"]


def test_half_of_a_pair_in_raw_bytes_is_no_json(http: httpx.Client) -> None:
    status, answer = post(http, "/v1/completions", b'{"prompt": "\xed\xa0\xbd"}')
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_whole_pairs_and_texts_about_them_pass(http: httpx.Client, served: Any) -> None:
    status, answer = post(http, "/tokenize", '{"prompt": "\\ud83d\\ude00 \\\\ud83d"}')
    assert status == 200
    assert served.agent.tokenizer.decode(answer["tokens"]) == "😀 \\ud83d"


# ---- numbers and nulls ----

WHOLE = [
    *({"max_tokens": 2.0}, {"n": 1.0}, {"seed": 5.0}, {"top_k": 20.0}, {"min_tokens": 1.0}, {"stop_token_ids": [5.0]}),
    *({"top_k": -1.0}, {"seed": 1e3}, {"logprobs": 1.0}, {"prompt": [5.0, 6.0]}, {"max_tokens": 2e0}, {"best_of": 1.0}),
]


@pytest.mark.parametrize("change", WHOLE, ids=str)
def test_a_whole_number_may_be_written_with_a_point(http: httpx.Client, change: dict[str, Any]) -> None:
    written = json.dumps(TEXT | {"temperature": 0, "ignore_eos": True} | change)
    assert ".0" in written
    status, answer = post(http, "/v1/completions", written)
    assert status == 200, answer
    plain = post(http, "/v1/completions", written.replace(".0", ""))[1]
    assert plain["usage"] == answer["usage"]


@pytest.mark.parametrize("value", ["1.5", "1e-1", "1e400", "-1.0", "true", '"2"', "1e18"])
def test_what_is_no_whole_number_is_still_refused(http: httpx.Client, value: str) -> None:
    status, answer = post(http, "/v1/completions", f'{{"prompt": "one", "max_tokens": {value}}}')
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


def test_top_p_of_zero_is_greedy(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "base",
        "prompt": "one two",
        "max_tokens": 30,
        "extra_body": {"ignore_eos": True},
    }
    greedy = client.completions.create(**options, temperature=0).choices[0].text
    assert client.completions.create(**options, temperature=2, top_p=0, seed=3).choices[0].text == greedy
    assert client.completions.create(**options, temperature=2, top_p=1, seed=3).choices[0].text != greedy


COMMON_FIELDS = (
    "frequency_penalty", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "ignore_eos", "logit_bias",
    "logprobs", "max_tokens", "metadata", "min_p", "min_tokens", "model", "n", "no_such_field", "presence_penalty",
    "repetition_penalty", "response_format", "seed", "stop", "stop_token_ids", "stream", "stream_options",
    "structured_outputs", "suffix", "temperature", "top_k", "top_p", "user",
)  # fmt: skip
CHAT_FIELDS = (*COMMON_FIELDS, "max_completion_tokens", "tools", "tool_choice", "top_logprobs")


def test_null_is_neutral_in_every_field(http: httpx.Client) -> None:
    for path, body, fields in (
        ("/v1/completions", {"prompt": "one two"}, (*COMMON_FIELDS, "echo", "best_of")),
        ("/v1/chat/completions", {"messages": CHAT}, CHAT_FIELDS),
    ):
        nulls = dict.fromkeys(fields)
        status, answer = post(http, path, json.dumps(nulls | body | {"temperature": 0, "max_tokens": 3}))
        assert status == 200, answer
        plain = post(http, path, json.dumps(body | {"temperature": 0, "max_tokens": 3}))[1]
        assert answer["choices"] == plain["choices"]


MESSAGES = [
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": None, "tool_calls": None, "function_call": None, "refusal": None, "audio": None},
    {"role": "assistant", "content": "", "tool_calls": [], "annotations": []},
    {"role": "assistant", "tool_calls": None, "reasoning_content": None, "no_such_field": None},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": [{"type": "text", "text": None, "cache_control": None}]},
    {"role": "assistant"},
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_null_is_neutral_in_messages(http: httpx.Client, message: dict[str, Any]) -> None:
    body = {"messages": [CHAT[0] | {"name": None}, message, CHAT[0]], "max_tokens": 3, "temperature": 0}
    status, answer = post(http, "/v1/chat/completions", json.dumps(body))
    assert status == 200, answer
    empty = [CHAT[0], {"role": "assistant", "content": ""}, CHAT[0]]
    assert answer["choices"] == post(http, "/v1/chat/completions", json.dumps(body | {"messages": empty}))[1]["choices"]


@pytest.mark.parametrize(
    "change",
    [{"stream_options": {"include_usage": None}}, {"logit_bias": {"5": None}}, {"stream_options": {"a": None}}],
)
def test_null_is_neutral_inside_of_objects(http: httpx.Client, change: dict[str, Any]) -> None:
    assert post(http, "/v1/chat/completions", json.dumps(GOOD | change))[0] == 200


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_a_null_prompt_is_a_missing_one(http: httpx.Client, field: str) -> None:
    path = "/v1/chat/completions" if field == "messages" else "/v1/completions"
    status, answer = post(http, path, json.dumps({field: None}))
    assert (status, answer["error"]["param"]) == (400, field)
    assert "missing" in answer["error"]["message"]


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=str)
def test_no_model_is_the_base_model(http: httpx.Client, model: dict[str, Any]) -> None:
    """As in vLLM."""
    status, answer = post(http, "/v1/completions", json.dumps({"prompt": "one", "max_tokens": 1} | model))
    assert (status, answer["model"]) == (200, "base")
