"""Anthropic's Messages API through the unmodified client, on models that say what they were made to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hermes_model import SCRIPTS

AT: dict[str, Any] = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK: dict[str, Any] = {"name": "look", "input_schema": AT}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
WAIT: dict[str, Any] = {"name": "wait", "input_schema": NOTHING}
INPUT = {"at": "é 😀 me"}
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def spoken(hermes: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def asked() -> Callable[..., dict[str, Any]]:
    def asked(said: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": said}]
        given = {"model": "base", "max_tokens": 100, "tools": [LOOK, WAIT], "messages": messages}
        return given | more

    return asked


@pytest.fixture
def ask(spoken: anthropic.Anthropic, asked: Ask) -> Ask:
    return lambda said, **more: spoken.messages.create(**asked(said, **more))


def outline(message: Any) -> list[Any]:
    """What its blocks say, without their ids."""
    return [
        (block.name, block.input) if block.type == "tool_use" else (block.type, getattr(block, block.type))
        for block in message.content
    ]


EXPECTED = {
    "[call]": [("look", INPUT)],
    "[two]": [("text", "Sure."), ("look", {}), ("wait", {})],
    "[text]": [("text", "just text")],
    "[broken]": [("text", '<tool_call>{"name": "look", oops')],
    "[empty]": [],
    "[hm]": [("thinking", "hm hm"), ("text", "so be it")],
}


@pytest.mark.parametrize("said", SCRIPTS)
def test_an_answer(ask: Ask, said: str) -> None:
    message = ask(said)
    assert outline(message) == EXPECTED[said]
    calls = any(block.type == "tool_use" for block in message.content)
    assert (message.stop_reason, message.stop_sequence) == ("tool_use" if calls else "end_turn", None)
    assert (message.role, message.type, message.model) == ("assistant", "message", "base")
    assert message.usage.output_tokens == len(SCRIPTS[said]) + 1


@pytest.mark.parametrize("said", SCRIPTS)
def test_events_come_in_order_and_say_what_the_answer_says(
    hermes: Any, spoken: anthropic.Anthropic, asked: Ask, said: str
) -> None:
    """Each block begins, grows by deltas of its own kind and ends before the next."""
    with httpx.stream("POST", f"{hermes.url}/v1/messages", json=asked(said, stream=True), timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [event["type"] for event in events] == names
    assert (names[:2], names[-2:]) == (["message_start", "ping"], ["message_delta", "message_stop"])
    open_kind, index = None, -1
    delta_of = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert open_kind is None
            open_kind, index = event["content_block"]["type"], index + 1
        elif event["type"] == "content_block_delta":
            assert event["delta"]["type"] == delta_of[str(open_kind)]
        else:
            assert event["type"] == "content_block_stop" and open_kind is not None
            open_kind = None
        assert event["index"] == index
    assert open_kind is None

    with spoken.messages.stream(**asked(said)) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    alone = spoken.messages.create(**asked(said))
    assert outline(final) == outline(alone) == EXPECTED[said]
    assert (final.stop_reason, final.stop_sequence) == (alone.stop_reason, alone.stop_sequence)
    assert final.usage.output_tokens == alone.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_why_an_answer_ends(spoken: anthropic.Anthropic, ask: Ask, asked: Ask, stream: bool) -> None:
    def end(said: str, **more: Any) -> tuple[Any, Any, list[Any]]:
        if stream:
            with spoken.messages.stream(**asked(said, **more)) as running:
                message: Any = running.get_final_message()
        else:
            message = ask(said, **more)
        return message.stop_reason, message.stop_sequence, outline(message)

    assert end("[text]", stop_sequences=["zzz", "ext"]) == ("stop_sequence", "ext", [("text", "just t")])
    sampling = {"temperature": 0, "top_k": 1, "top_p": 0.5}  # the client has no parameters for them any more
    assert end("[text]", max_tokens=1, extra_body=sampling) == ("max_tokens", None, [("text", "just ")])
    reason, _, (block,) = end("[call]", max_tokens=4, tool_choice={"type": "any"})
    assert (reason, block[0]) == ("max_tokens", "look")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "wait"}])
def test_tool_choice_holds_the_answer_to_calls(ask: Ask, choice: dict[str, Any]) -> None:
    message = ask("[call]", tool_choice=choice | {"disable_parallel_tool_use": True})
    assert outline(message) == [("look", INPUT) if choice["type"] == "any" else ("wait", {})]
    none = ask("[two]", tool_choice={"type": "none"})
    assert [block.type for block in none.content] == ["text"]


def test_the_loop_of_a_tool(spoken: anthropic.Anthropic) -> None:
    """As Anthropic's guide has it: the answer's content goes back, and the results behind it."""
    messages: list[Any] = [{"role": "user", "content": "[call]"}]
    asked: dict[str, Any] = {
        "model": "base",
        "max_tokens": 50,
        "tools": [LOOK],
        "system": [{"type": "text", "text": "s"}],
    }
    first = spoken.messages.create(messages=messages, **asked)
    (block,) = first.content
    assert block.type == "tool_use"
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "[hm]"}]},
    ]
    second = spoken.messages.create(messages=messages, **asked)
    assert outline(second) == EXPECTED["[hm]"]
    messages += [{"role": "assistant", "content": second.content}, {"role": "user", "content": "[text]"}]
    assert outline(spoken.messages.create(messages=messages, **asked)) == EXPECTED["[text]"]
    assert spoken.messages.count_tokens(model="base", messages=messages, tools=[LOOK]).input_tokens > 20


def test_an_answer_that_has_begun_goes_on(ask: Ask) -> None:
    begun = [{"role": "user", "content": "[text]"}, {"role": "assistant", "content": "just "}]
    assert outline(ask("", messages=begun)) == [("text", "text")]


def test_a_budget_of_thoughts_is_taken(ask: Ask) -> None:
    assert outline(ask("[hm]", thinking={"type": "enabled", "budget_tokens": 1024})) == EXPECTED["[hm]"]


def test_a_count_is_that_of_the_prompt(hermes: Any, spoken: anthropic.Anthropic) -> None:
    """And of what an answer is said to have cost, kept or not; a prompt that is too long can be counted, too."""
    messages: Any = [{"role": "user", "content": "one two three four five six seven " * 2 + "[text]"}]
    count = spoken.messages.count_tokens(model="base", messages=messages, system="s").input_tokens
    for _ in range(2):
        usage = spoken.messages.create(model="base", messages=messages, system="s", max_tokens=5).usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none") as client:
        chat: Any = [{"role": "system", "content": "s"}, *messages]
        answer = client.chat.completions.create(model="base", messages=chat, max_tokens=5)
    assert answer.usage is not None and answer.usage.prompt_tokens == count
    long: Any = [{"role": "user", "content": "one " * 600}]
    assert spoken.messages.count_tokens(model="base", messages=long).input_tokens > 256


def test_an_answer_held_to_a_schema(ask: Ask) -> None:
    schema = {
        "type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = ask("[text]", output_config=form, tools=[])
    assert json.loads(message.content[0].text) == {"n": 7}


@pytest.mark.parametrize(
    ("change", "status", "kind", "words"),
    [
        ({"model": "other"}, 404, "not_found_error", "'other' is not served here"),
        ({"thinking": {"type": "disabled"}}, 400, "invalid_request_error", "no variable that would switch it off"),
        ({"max_tokens": 1000}, 400, "invalid_request_error", "lower max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error",
         "'image'"),
        ({"tools": [LOOK | {"input_schema": {"type": "object", "properties": {"a": {"contains": 1}}}}],
          "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tools[0].input_schema: the schema's #/"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "array", "uniqueItems": True}}},
          "tools": []}, 400, "invalid_request_error", "output_config.format.schema: the schema's #/uniqueItems"),
        ({"system": "x" * (1 << 23)}, 413, "request_too_large", "larger than"),
    ],
)  # fmt: skip
def test_errors_are_in_this_apis_form(
    hermes: Any, asked: Ask, change: dict[str, Any], status: int, kind: str, words: str
) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{hermes.url}/v1/messages", json=asked("x", stream=stream) | change, timeout=60)
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), body
        assert words in body["error"]["message"]


def test_errors_of_the_routes_themselves(hermes: Any, spoken: anthropic.Anthropic) -> None:
    for method, path, status in (("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404)):
        answer = httpx.request(method, f"{hermes.url}{path}")
        assert (answer.status_code, answer.json()["type"]) == (status, "error")
    with pytest.raises(anthropic.NotFoundError):
        spoken.messages.create(model="other", max_tokens=5, messages=[{"role": "user", "content": "x"}])
