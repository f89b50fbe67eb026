"""What the OpenAI-compatible API refuses, in the words of a remedy, and what it takes that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GOOD = {"model": "base", "messages": CHAT, "max_tokens": 2}
NEUTRAL = [
    *({"n": 1}, {"user": "me"}, {"metadata": {"a": "b"}}, {"logprobs": False}, {"logprobs": None}, {"tools": []}),
    *({"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"response_format": {"type": "text"}}, {"store": True}),
    *({"logit_bias": {}}, {"stop": None}, {"top_p": 1}, {"seed": None}, {"stop": "xyz"}, {"tool_choice": "none"}),
    *({"service_tier": "auto"}, {"stream_options": None}, {"top_k": -1}, {"repetition_penalty": 1.0}),
    *(
        {"top_k": 0},
        {"min_p": 0},
        {"top_p": 0},
        {"min_tokens": 0},
        {"top_logprobs": 0},
        {"best_of": 1},
        {"prompt_logprobs": False},
    ),
]
REFUSED = [
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"echo": True}, "echo"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"fox": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [100000]}, "stop_token_ids"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json"}}, "response_format"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 1 << 31}, "top_k"),
    ({"top_k": 10**400}, "top_k"),
    ({"min_tokens": 10**400}, "min_tokens"),
    ({"nonsense": 1}, "nonsense"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"other": 1}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"model": 5}, "model"),
    ({"model": "x" * 513}, "model"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, "messages"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "x", "reasoning_content": "y"}, *CHAT]}, "messages"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "x", "weight": 0}, *CHAT]}, "messages"),
    ({"messages": [{"role": "developer", "content": "x"}, *CHAT]}, "messages"),
]


@pytest.mark.parametrize("change", NEUTRAL, ids=str)
def test_neutral_parameters_are_accepted(http: httpx.Client, change: dict[str, Any]) -> None:
    answer = http.post("/v1/chat/completions", json=GOOD | change)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[str(change)[:60] for change, _ in REFUSED])
def test_wrong_parameters_are_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/chat/completions", json=GOOD | change)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_a_name_that_the_template_does_not_write_changes_nothing(http: httpx.Client) -> None:
    """LangChain and AutoGen send one with each message; vLLM, too, leaves it to the template."""
    named = [{**message, "name": "Anna_1"} for message in (*CHAT, {"role": "assistant", "content": "x"}, *CHAT)]
    nameless = [{**message, "name": None} for message in named]
    answers = [
        http.post("/v1/chat/completions", json=GOOD | {"messages": one, "return_token_ids": True, "seed": 1}).json()
        for one in (named, nameless)
    ]
    assert answers[0]["prompt_token_ids"] == answers[1]["prompt_token_ids"]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_tool_calls_that_a_template_would_drop_are_refused(http: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": "{}"}}
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}, *CHAT]
    answer = http.post("/v1/chat/completions", json=GOOD | {"messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
    assert "tool_calls" in error["message"]


def test_content_parts_of_text_are_joined(http: httpx.Client) -> None:
    """By line ends, as in vLLM, where the template takes a string."""
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": "brown fox"}]
    joined, plain = (
        http.post("/v1/chat/completions", json=GOOD | {"messages": [{"role": "user", "content": said}], "seed": 1})
        for said in (parts, "the quick\nbrown fox")
    )
    assert joined.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("body", ["", "{", "[1]", '"x"', "\xff", "{" * 100_000])
def test_a_body_that_is_no_json_object(http: httpx.Client, body: str) -> None:
    answer = http.post("/v1/completions", content=body.encode("latin-1"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    body = json.dumps({"model": "base", "prompt": "x" * (1 << 20)})
    assert http.post("/v1/completions", content=body).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (body[i : i + 65536].encode() for i in range(0, len(body), 65536))

    assert http.post("/v1/completions", content=pieces()).status_code == 413


def test_prompts_that_do_not_fit(http: httpx.Client) -> None:
    long = http.post("/v1/completions", json={"model": "base", "prompt": [5] * 256}).json()["error"]
    assert (long["code"], long["param"]) == ("context_length_exceeded", "prompt")
    assert "256 tokens" in long["message"]
    both = http.post("/v1/completions", json={"model": "base", "prompt": [5] * 200, "max_tokens": 57}).json()["error"]
    assert (both["code"], both["param"]) == ("context_length_exceeded", "max_tokens")
    assert "200" in both["message"]
    assert "56" in both["message"]
    fits = http.post("/v1/completions", json={"model": "base", "prompt": [5] * 255, "max_tokens": 1})
    assert fits.status_code == 200
    chat = [{"role": "user", "content": "fox " * 5000}]
    error = http.post("/v1/chat/completions", json={"model": "base", "messages": chat}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


NO_PROMPTS: list[Any] = ["", [], [1, "a"], None, 5, [True], [[]], [""], ["a", ""], [[1], []], ["a", [1]], [[[1]]]]
NO_IDS = (-1, 320, 10**6, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 + 5, 10**400, -(2**31), -(2**63) - 1)


@pytest.mark.parametrize("echo", (False, True))
def test_prompts_that_are_wrong(http: httpx.Client, echo: bool) -> None:
    wrong_ids = [prompt for token in NO_IDS for prompt in ([token], [5, token], [[5], [5, token]])]
    for prompt in NO_PROMPTS + wrong_ids:
        answer = http.post("/v1/completions", json={"model": "base", "prompt": prompt, "echo": echo})
        assert answer.status_code == 400, (prompt, answer.text)
        assert answer.json()["error"]["param"] == "prompt"
    message = answer.json()["error"]["message"]
    assert all(word in message for word in ("prompt[1]", str(NO_IDS[-1]), "0 to 319")), message


def test_nothing_to_say_needs_a_prompt_to_score(http: httpx.Client) -> None:
    """As in vLLM: max_tokens 0 is for scoring, with echo."""
    answer = http.post("/v1/completions", json={"model": "base", "prompt": "one", "max_tokens": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert "echo" in answer.json()["error"]["message"]


def test_more_prompts_than_may_wait(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "base", "prompt": [[5]] * 129, "n": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert "258 choices" in answer.json()["error"]["message"]


def test_an_unknown_model_names_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=CHAT)
    assert caught.value.code == "model_not_found"
    assert "served are: base" in str(caught.value)


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert http.get("/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
