"""What clients of other servers take for granted: paths, events, errors known by their words, browsers. An agent that
is set up otherwise than that of the other tests answers the second half.
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
from agent_programs import post

from coserve_agent.http.stream import event

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GOOD = {"model": "base", "messages": CHAT, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "one two", "max_tokens": 2}
PAGE = "https://chat.example.com"


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
