"""Tools over HTTP: the unmodified client against real agents, on models that say what they were made to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from hermes_model import SCRIPTS
from scripted_model import write_scripted

MISTRAL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
)
MISTRAL_SCRIPTS = {"[call]": ["Yes. ", "[TOOL_CALLS]", "look", "[ARGS]", '{"at": ', '"me"}'], "[text]": ["text"]}

AT: dict[str, Any] = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": AT}}
WAIT = {"type": "function", "function": {"name": "wait"}}
ARGUMENTS = '{"at": "é 😀 me"}'
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def client(hermes: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client: openai.OpenAI) -> Ask:
    def ask(said: str, **more: Any) -> Any:
        messages = [{"role": "user", "content": said}]
        given = {"tools": [LOOK, WAIT], "temperature": 0, "max_tokens": 100} | more
        return client.chat.completions.create(model="base", messages=messages, **given)

    return ask


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """Choices of a stream put together, by index."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"content": "", "thought": "", "calls": [], "tokens": [], "ids": []})
            one["content"] += choice.delta.content or ""
            one["thought"] += getattr(choice.delta, "reasoning_content", None) or ""
            one["tokens"] += [token.token for token in (choice.logprobs.content or ())] if choice.logprobs else []
            one["ids"] += getattr(choice, "token_ids", None) or []
            for call in choice.delta.tool_calls or ():
                if call.index == len(one["calls"]):
                    assert call.id and call.type == "function" and call.function.arguments == ""
                    one["calls"].append([call.function.name, ""])
                one["calls"][call.index][1] += call.function.arguments
            assert one.get("finish") is None
            one["finish"] = choice.finish_reason
    return found


def whole(choice: Any) -> dict[str, Any]:
    message = choice.message
    return {
        "content": message.content or "",
        "thought": getattr(message, "reasoning_content", None) or "",
        "calls": [[call.function.name, call.function.arguments] for call in message.tool_calls or ()],
        "tokens": [token.token for token in choice.logprobs.content] if choice.logprobs else [],
        "ids": getattr(choice, "token_ids", None) or [],
        "finish": choice.finish_reason,
    }


@pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "function": {"name": "look"}}])
def test_a_call(ask: Ask, tool_choice: Any) -> None:
    answer = ask("[call]", tool_choice=tool_choice)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "look", ARGUMENTS)
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert answer.usage.completion_tokens == 7


def test_text_and_several_calls(ask: Ask) -> None:
    found = whole(ask("[two]").choices[0])
    assert (found["content"], found["calls"]) == ("Sure.", [["look", "{}"], ["wait", "{}"]])
    single = whole(ask("[two]", parallel_tool_calls=False).choices[0])
    assert (single["content"], single["calls"], single["finish"]) == ("Sure.", [["look", "{}"]], "tool_calls")


@pytest.mark.parametrize(
    ("said", "more", "content"),
    [
        ("[text]", {}, "just text"),
        ("[broken]", {}, '<tool_call>{"name": "look", oops'),
        ("[call]", {"tool_choice": "none"}, f'<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>'),
        ("[call]", {"tools": []}, f'<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>'),
    ],
)
def test_what_is_no_call_is_content(ask: Ask, said: str, more: dict[str, Any], content: str) -> None:
    (choice,) = ask(said, **more).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (content, None, "stop")


def test_what_was_thought_is_apart(ask: Ask) -> None:
    (choice,) = ask("[hm]").choices
    assert (choice.message.reasoning_content, choice.message.content) == ("hm hm", "so be it")
    (choice,) = ask("[hm]", tools=[]).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("hm hm", "so be it")


@pytest.mark.parametrize("said", SCRIPTS)
def test_a_stream_joined_is_the_whole(ask: Ask, said: str) -> None:
    more = {"logprobs": True, "n": 2, "extra_body": {"return_token_ids": True}}
    expected = {choice.index: whole(choice) for choice in ask(said, **more).choices}
    *chunks, usage = ask(said, stream=True, stream_options={"include_usage": True}, **more)
    assert joined(chunks) == expected
    assert usage.usage.completion_tokens == sum(len(one["ids"]) for one in expected.values())
    assert len(expected[0]["tokens"]) == len(SCRIPTS[said])


def test_a_call_begins_without_arguments_and_a_free_one_comes_when_it_is_whole(ask: Ask) -> None:
    def parts(**more: Any) -> list[str]:
        chunks = ask("[call]", stream=True, **more)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        return [call.function.arguments for call in calls]

    assert parts() == ["", ARGUMENTS]
    first, *held = parts(tool_choice="required")
    assert (first, "".join(held)) == ("", ARGUMENTS)


def test_a_grammar_holds_arguments_to_the_schema(ask: Ask) -> None:
    """The model would say another place, and calls another function."""
    here = {
        "type": "object",
        "properties": {"at": {"enum": ["here"]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "look", "parameters": here}}, WAIT]
    for choice in ask("[call]", tools=tools, tool_choice="required", parallel_tool_calls=False, n=2).choices:
        ((name, arguments),) = whole(choice)["calls"]
        assert (name, json.loads(arguments)) == ("look", {"at": "here"})
    named = {"type": "function", "function": {"name": "wait"}}
    ((name, arguments),) = whole(ask("[call]", tool_choice=named).choices[0])["calls"]
    assert (name, json.loads(arguments)) == ("wait", {})


@pytest.mark.parametrize("more", [{"max_tokens": 4}, {"stop": ["😀"]}])
def test_a_call_that_is_cut(ask: Ask, more: dict[str, Any]) -> None:
    finish = "length" if "max_tokens" in more else "stop"
    held, free = (whole(ask("[call]", tool_choice=one, **more).choices[0]) for one in ("required", "auto"))
    written = '{"at": "é ' if "stop" in more else '{"at": "é 😀 me"'
    assert (held["content"], held["calls"], held["finish"]) == ("", [["look", written]], finish)
    raw = f'<tool_call>\n{{"name": "look", "arguments": {written}'
    assert (free["content"], free["calls"], free["finish"]) == (raw, [], finish)


def test_a_schema_that_cannot_be_held_is_named_and_auto_takes_it(ask: Ask) -> None:
    odd = {"type": "object", "properties": {"at": {"contains": 1}}}
    tools = [WAIT, {"type": "function", "function": {"name": "look", "parameters": odd}}]
    with pytest.raises(
        openai.BadRequestError, match=r"tools\[1\].function.parameters: the schema's #/properties/at"
    ) as error:
        ask("[call]", tools=tools, tool_choice="required")
    assert error.value.param == "tools"
    assert whole(ask("[call]", tools=tools).choices[0])["calls"] == [["look", ARGUMENTS]]


def test_the_clients_own_helpers(client: openai.OpenAI) -> None:
    class Look(pydantic.BaseModel):
        at: str

    tool = openai.pydantic_function_tool(Look, name="look")
    asked: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "[call]"}], "tools": [tool]}
    parsed = client.chat.completions.parse(**asked, max_tokens=50)
    calls = parsed.choices[0].message.tool_calls
    assert calls and calls[0].function.parsed_arguments == Look(at="é 😀 me")
    for choice in ("auto", "required"):
        choice_: Literal["auto", "required"] = "auto" if choice == "auto" else "required"
        with client.chat.completions.stream(**asked, max_tokens=50, tool_choice=choice_) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        calls = final.choices[0].message.tool_calls
        assert calls and calls[0].function.parsed_arguments == Look(at="é 😀 me")


def test_a_result_goes_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "[call]"}]
    message = (
        client.chat.completions.create(model="base", messages=messages, tools=[LOOK], max_tokens=50).choices[0].message
    )  # type: ignore[list-item]
    assert message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "[text]"}]
    again = client.chat.completions.create(model="base", messages=messages, tools=[LOOK], max_tokens=50)  # type: ignore[list-item]
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("just text", "stop")


def test_a_model_whose_markers_are_special_tokens(
    start_agent: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    special = ("[TOOL_CALLS]", "[ARGS]")
    folder = write_scripted(tmp_path_factory.mktemp("mistral"), MISTRAL_TEMPLATE, MISTRAL_SCRIPTS, special)
    with openai.OpenAI(base_url=f"{start_agent(model_path=folder).url}/v1", api_key="none", max_retries=0) as client:

        def ask(**more: Any) -> dict[str, Any]:
            asked: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "[call]"}]}
            return whole(client.chat.completions.create(**asked, temperature=0, max_tokens=50, **more).choices[0])

        found = ask(tools=[LOOK])
        assert (found["content"], found["calls"], found["finish"]) == ("Yes.", [["look", '{"at": "me"}']], "tool_calls")
        plain = ask()
        assert (plain["content"], plain["calls"]) == ('Yes. look{"at": "me"}', [])
        named = ask(tools=[LOOK, WAIT], tool_choice={"type": "function", "function": {"name": "wait"}})
        assert [name for name, _ in named["calls"]] == ["wait"]


def test_a_template_that_shows_no_tools_is_named(http: httpx.Client) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "tools": [LOOK]}
    answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "tools", "unsupported_parameter")


def test_an_answer_goes_on_with_the_last_message(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "[call]"}, {"role": "assistant", "content": "just "}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(model="base", messages=messages, max_tokens=50, extra_body=more)
    assert answer.choices[0].message.content == "text"
    with pytest.raises(openai.BadRequestError, match="continue_final_message") as error:
        client.chat.completions.create(model="base", messages=messages[:1], extra_body=more)
    assert error.value.param == "messages"
