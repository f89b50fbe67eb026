"""What clients of other servers take for granted: text that is none, numbers, nulls, paths, events, errors known by
their words, browsers. An agent that is set up otherwise than that of the other tests answers the second half.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from coserve_agent.http.stream import event

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GOOD = {"model": "base", "messages": CHAT, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "one two", "max_tokens": 2}
PAGE = "https://chat.example.com"


def post(http: httpx.Client, path: str, body: str | bytes) -> tuple[int, dict[str, Any]]:
    answer = http.post(path, content=body if isinstance(body, bytes) else body.encode())
    return answer.status_code, answer.json()


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
    "frequency_penalty", "guided_json", "ignore_eos", "logit_bias", "logprobs", "max_tokens", "metadata", "min_p",
    "min_tokens", "model", "n", "no_such_field", "presence_penalty", "repetition_penalty", "seed", "stop",
    "stop_token_ids", "stream", "stream_options", "suffix", "temperature", "top_k", "top_p", "user",
)  # fmt: skip
CHAT_FIELDS = (*COMMON_FIELDS, "max_completion_tokens", "response_format", "tools", "tool_choice", "top_logprobs")


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


# ---- paths ----


def test_a_last_slash_changes_nothing(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.get("/v1/models/base/").json() == http.get("/v1/models/base").json()
    assert http.post("/v1/completions/", json=TEXT).status_code == 200
    assert http.get("/nothing/").json()["error"]["code"] == "not_found"
    assert http.get("/").status_code == 404
    assert http.get("//").status_code == 404


# ---- events ----


def test_an_event_is_one_line_by_any_rule() -> None:
    """Every character that str.splitlines, and so httpx and others, ends a line at."""
    ends = [chr(code) for code in range(sys.maxunicode + 1) if len(f"a{chr(code)}b".splitlines()) > 1]
    assert {"\n", "\r", "\x0b", "\x85", "\u2028", "\u2029"} <= set(ends)
    for text in (*ends, "".join(ends), "\\u2028", "\ud7ff\ue000 😀"):
        data = {f"key{text}": text, "list": [text]}
        written = event(data).decode()
        assert written.splitlines() == [written.removesuffix("\n\n"), ""]
        assert json.loads(written.removeprefix("data: ")) == data


def test_line_separators_survive_a_stream_read_by_lines(http: httpx.Client) -> None:
    prompt = "one\u2028two\u2029three\x85four"
    body = TEXT | {"prompt": prompt, "echo": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(prompt)


# ---- errors known by their words ----

LITELLM = "this model's maximum context length is"
"""Of ExceptionCheckers.is_error_str_context_window_exceeded, which compares in lower case."""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [5] * 256}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 300, "max_tokens": 5}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 200, "max_tokens": 57}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "fox " * 5000}]}, "messages"),
        ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 2**31 - 1}, "max_tokens"),
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_its_words(
    client: openai.OpenAI, path: str, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path.removeprefix("/v1"), body={"model": "base"} | body, cast_to=object)
    assert LITELLM in str(caught.value).lower()
    assert "This model's maximum context length is 256 tokens" in caught.value.message
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)  # the code is LangChain's mark


# ---- another agent: a template of many opinions, a page that may call it, a name of two parts ----

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content if m.role not in ('tool', 'critic', 'developer') %}"
    "{% if part.text == 'zero' %}{{ 1 // 0 }}{% endif %}{% if part.text == 'type' %}{{ 1 + 'a' }}{% endif %}"
    "{% if part.text == 'raise' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{% if part.text == 'undefined' %}{{ messages[99].content.x }}{% endif %}"
    "<|{{ m.role }}|>{{ m.name }}{{ part.text }}{% endfor %}"
    "{% if m.reasoning_content %}~{{ m.reasoning_content }}{% endif %}"
    "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }} {{ m.content }}){% endif %}{% endfor %}<|assistant|>"
)
GENERATION = {
    "temperature": 1.5,
    "top_k": 1,
    "max_new_tokens": 7.0,
    "top_p": None,
    "do_sample": False,
    "eos_token_id": 3,
}


@pytest.fixture(scope="module")
def opinionated(start_agent: Callable[..., Any], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("opinionated")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(model_folder / name)
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return start_agent(model_path=folder, model_name="org/model-8b", cors_origins=f"{PAGE},http://localhost:3000")


@pytest.fixture
def other(opinionated: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=opinionated.url, timeout=60) as client:
        yield client


def test_a_name_with_a_slash_is_served_and_found(opinionated: Any) -> None:
    with openai.OpenAI(base_url=f"{opinionated.url}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["org/model-8b"]
        assert client.models.retrieve("org/model-8b").id == "org/model-8b"
        answer = client.chat.completions.create(model="org/model-8b", messages=CHAT)
        assert answer.model == "org/model-8b"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/another")


@pytest.mark.parametrize("what", ["zero", "type", "raise", "undefined"])
def test_what_a_template_raises_is_a_400(other: httpx.Client, what: str) -> None:
    for content in (what, [{"type": "text", "text": what}]):
        status, answer = post(other, "/v1/chat/completions", json.dumps({"messages": [CHAT[0] | {"content": content}]}))
        assert (status, answer["error"]["param"]) == (400, "messages")
    assert "no user" in answer["error"]["message"] or what != "raise"


def test_a_conversation_with_tools_reaches_the_template(opinionated: Any, other: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Ulm"}'}}
    said = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    found = [{"type": "text", "text": "blue"}, {"type": "text", "text": "ish"}]
    messages = [
        {"role": "user", "content": said, "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": found, "tool_call_id": "c1"},
    ]
    written = "<|user|>na<|user|>nb<|user|>nc[sky Ulm](c1 blue\nish)<|assistant|>"
    status, answer = post(other, "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 1}))
    assert status == 200, answer
    expected = opinionated.agent.tokenizer.encode(written, add_special_tokens=False)
    assert answer["usage"]["prompt_tokens"] == len(expected)
    broken = [messages[0], messages[1] | {"tool_calls": [call | {"function": {"name": "sky", "arguments": "{"}}]}]
    status, answer = post(other, "/v1/chat/completions", json.dumps({"messages": broken}))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "no JSON" in answer["error"]["message"]


def test_reasoning_and_roles_reach_the_template_or_are_refused(opinionated: Any, other: httpx.Client) -> None:
    roles = ("developer", "user", "assistant", "user")
    messages = [{"role": role, "content": word} for role, word in zip(roles, "abcd", strict=True)]
    messages[2]["reasoning_content"] = "so"
    written = "<|system|>a<|user|>b<|assistant|>c~so<|user|>d<|assistant|>"
    status, answer = post(other, "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 1}))
    assert status == 200, answer
    expected = opinionated.agent.tokenizer.encode(written, add_special_tokens=False)
    assert answer["usage"]["prompt_tokens"] == len(expected)
    lost = [*CHAT, {"role": "critic", "content": "x"}]
    status, answer = post(other, "/v1/chat/completions", json.dumps({"messages": lost}))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "message 1 has role 'critic', which this model's chat template does not write" in answer["error"]["message"]


# ---- browsers ----


def test_a_page_may_ask_first_and_then_call(other: httpx.Client) -> None:
    asked = other.options(
        "/v1/chat/completions",
        headers={
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        },
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
    for path, body, status in (
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1}, 200),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, "stream": True}, 200),
        ("/v1/chat/completions", {"messages": 5}, 400),
        ("/nothing", {}, 404),
    ):
        answer = other.post(path, json=body, headers={"origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "origin" in answer.headers["vary"].lower()


def test_another_page_may_not(other: httpx.Client, http: httpx.Client) -> None:
    """Nor may any, where none is named."""
    for client in (other, http):
        headers = {"origin": "https://elsewhere.example.com", "access-control-request-method": "POST"}
        asked = client.options("/v1/chat/completions", headers=headers)
        assert asked.status_code >= 400
        assert "access-control-allow-origin" not in asked.headers
        answer = client.get("/v1/models", headers=headers)
        assert "access-control-allow-origin" not in answer.headers


def test_every_page_may_where_the_option_is_a_star() -> None:
    """Without an agent: the layer alone."""
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.testclient import TestClient  # noqa: PLC0415

    from coserve_agent.http.middleware import wrap  # noqa: PLC0415

    answer = TestClient(wrap(Starlette(), ("*",))).get("/x", headers={"origin": "null"})
    assert answer.headers["access-control-allow-origin"] == "*"


# ---- the model's own sampling ----


def test_the_models_defaults_hold_where_a_request_is_silent(opinionated: Any, other: httpx.Client) -> None:
    """top_k 1 makes temperature 1.5 greedy; 7 tokens are the most of an answer."""
    assert str(opinionated.agent.generator.defaults) == "temperature 1.5, top_k 1, max_tokens 7"

    def ask(**options: Any) -> dict[str, Any]:
        status, answer = post(
            other, "/v1/chat/completions", json.dumps({"messages": CHAT, "ignore_eos": True} | options)
        )
        assert status == 200, answer
        return answer

    plain = ask(seed=1)
    assert plain["usage"]["completion_tokens"] == 7
    assert plain["choices"] == ask(seed=2)["choices"] == ask(temperature=0, top_k=0)["choices"]
    assert plain["choices"] == ask(temperature=None, top_k=None, max_tokens=None)["choices"]
    long = ask(max_tokens=60, temperature=2, top_k=0, seed=3)
    assert long["usage"]["completion_tokens"] == 60
    free = {ask(seed=seed, top_k=-1, temperature=2)["choices"][0]["message"]["content"] for seed in range(3)}
    assert len(free) > 1
    assert (
        post(other, "/v1/completions", json.dumps({"prompt": "a", "ignore_eos": True}))[1]["usage"]["completion_tokens"]
        == 7
    )


def test_a_default_shrinks_to_the_room_that_is_left(other: httpx.Client) -> None:
    body = {"prompt": [5] * 252, "ignore_eos": True}
    assert post(other, "/v1/completions", json.dumps(body))[1]["usage"]["completion_tokens"] == 4
