"""Content blocks as messages of a chat, what a request may say, and how an answer is written: without an agent."""

from __future__ import annotations

from typing import Any

import pytest
from call_templates import tokenizer

from coserve_agent.generation.single import Ending, Usage
from coserve_agent.http.errors import ApiError
from coserve_agent.http.renamed import renaming
from coserve_agent.messages.request import FIELDS, CountTokensRequest, MessagesRequest, parse_messages
from coserve_agent.messages.thinking import ThinkingOptions, thinking_variables
from coserve_agent.messages.writer import MessageWriter
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.tools.answer_format import answer_format
from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Said

USER = {"role": "user", "content": "x"}
GOOD: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [USER]}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}
LOOK: dict[str, Any] = {"name": "look", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}


def of_chat(*, thoughts: bool = True, **change: Any) -> ChatRequest:
    asked = parse_messages(MessagesRequest, GOOD | change)
    with renaming(FIELDS):
        return asked.of_chat({}, thoughts=thoughts)


def messages(*given: Any, thoughts: bool = True, **more: Any) -> list[dict[str, Any]]:
    return [
        one.model_dump(exclude_unset=True) for one in of_chat(messages=list(given), thoughts=thoughts, **more).messages
    ]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": "look", "input": {"at": "me"}}


def result(id: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, **more}


def test_system_is_a_message_and_is_joined_to_one_that_comes_first() -> None:
    """Claude Code sends both."""
    assert messages(USER, system="be brief") == [{"role": "system", "content": "be brief"}, USER]
    blocks = [text("be brief") | {"cache_control": {"type": "ephemeral"}}, text(" and kind")]
    (system, _) = messages(USER, system=blocks)
    assert system == {"role": "system", "content": [text("be brief"), text(" and kind")]}
    (system, _) = messages({"role": "system", "content": "and kind"}, USER, system="be brief")
    assert system == {"role": "system", "content": "be brief\n\nand kind"}


def test_a_turn_with_calls_and_their_results() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    turn = {"role": "assistant", "content": [thought, text("so"), use("a"), use("b")]}
    back = {
        "role": "user",
        "content": [result("a", content="here"), result("b", content=[text("there")]), text("and?")],
    }
    found = messages(USER, turn, back)
    assert [one["role"] for one in found] == ["user", "assistant", "tool", "tool", "user"]
    assert (found[1]["content"], found[1]["reasoning_content"]) == ([text("so")], "hm")
    assert [(one["id"], one["function"]["arguments"]) for one in found[1]["tool_calls"]] == [
        ("a", {"at": "me"}), ("b", {"at": "me"}),
    ]  # fmt: skip
    assert found[2] == {"role": "tool", "tool_call_id": "a", "name": "look", "content": "here"}
    assert (found[3]["content"], found[4]["content"]) == ([text("there")], [text("and?")])


def test_results_without_content_and_behind_text_keep_their_places() -> None:
    turn = {"role": "assistant", "content": [use("a")]}
    found = messages(USER, turn, {"role": "user", "content": [text("well"), result("a", is_error=True)]})
    assert [(one["role"], one["content"]) for one in found[2:]] == [("user", [text("well")]), ("tool", "")]


def test_thoughts_are_left_out_where_the_template_writes_none() -> None:
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    turn = {"role": "assistant", "content": [hidden, {"type": "thinking", "thinking": "hm"}, text("so")]}
    assert messages(USER, turn, USER, thoughts=False)[1] == {"role": "assistant", "content": [text("so")]}


def test_an_answer_that_has_begun_goes_on() -> None:
    begun = of_chat(messages=[USER, {"role": "assistant", "content": "just "}])
    assert (begun.continue_final_message, begun.add_generation_prompt) == (True, False)
    asked = of_chat(messages=[USER])
    assert (asked.continue_final_message, asked.add_generation_prompt) == (False, True)


def test_sampling_tools_and_form_are_those_of_a_chat() -> None:
    asked = of_chat(
        temperature=0.5, top_p=0.5, top_k=3, stop_sequences=["x"], stream=True, tools=[LOOK], metadata={"user_id": "u"},
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )  # fmt: skip
    assert (asked.temperature, asked.top_p, asked.top_k, asked.stop, asked.max_tokens) == (0.5, 0.5, 3, ["x"], 5)
    assert (asked.callable, asked.must_call, asked.parallel_tool_calls) == ({"look": 0}, True, False)
    assert asked.tools is not None and asked.tools[0].function.parameters == SCHEMA
    assert of_chat(tools=[LOOK], tool_choice={"type": "any"}).tool_choice == "required"
    assert of_chat(tools=[LOOK], tool_choice={"type": "auto"}).parallel_tool_calls is True
    form = of_chat(
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}}
    ).response_format
    assert form is not None and form.json_schema is not None and form.json_schema.schema_ == SCHEMA


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [USER] * 4097}, "messages", "4096"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "messages.0.content"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": one, "source": {}}]}]}, "messages",
             "no block of a type that is supported")
            for one in ("image", "document", "search_result", "server_tool_use", 5)
        ),
        ({"messages": [{"role": "user", "content": [use("a")]}]}, "messages", "messages[0].content[0] is a tool_use"),
        ({"messages": [{"role": "assistant", "content": [result("a")]}]}, "messages", "is a tool_result"),
        ({"messages": [{"role": "system", "content": [result("a")]}]}, "messages", "is a tool_result"),
        ({"messages": [{"role": "user", "content": [result("a")]}]}, "messages", "no tool_use before it has that id"),
        ({"messages": [{"role": "user", "content": [result("a", content=[{"type": "tool_reference"}])]}]},
         "messages", "tool_reference"),
        ({"stop": ["x"]}, "stop", "use stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences", "at least 1"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences", "16"),
        ({"n": 2}, "n", "no parameter of this API"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "not supported"),
        ({"container": "c"}, "container", "not supported"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses"}]}}, "context_management", "not supported"),
        ({"output_config": {"effort": "low"}}, "output_config", "effort"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking", "display"),
        *(
            ({"tools": [{"type": one, "name": "t"}]}, "tools", f"tools of type '{one}' are not there")
            for one in ("bash_20250124", "web_search_20250305", "computer_20250124", "code_execution_20250825")
        ),
        ({"tools": [{"name": "t"}]}, "tools", "tools.0.input_schema is missing"),
        ({"tools": [LOOK | {"input_schema": {"type": "array"}}]}, "tools", "write 'object'"),
        ({"tools": [LOOK | {"input_examples": [{}]}]}, "tools", "input_examples"),
        ({"tools": [LOOK, LOOK]}, "tools", "two functions"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "tool_choice.type is 'any' and there are no tools"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice", "name is missing"),
        ({"tools": [LOOK], "tool_choice": {"type": "auto", "name": "look"}}, "tool_choice", "name is given"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "fly"}}, "tool_choice", "fly"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as error:
        of_chat(**change)
    assert (error.value.status, error.value.param) == (400, param)
    assert words in str(error.value)


def test_a_count_needs_no_max_tokens_and_takes_none() -> None:
    body = {"model": "m", "messages": [USER], "system": "s", "tools": [LOOK], "tool_choice": {"type": "auto"}}
    assert parse_messages(CountTokensRequest, body).of_chat({}, thoughts=True).max_tokens is None
    with pytest.raises(ApiError, match="stream is no parameter"):
        parse_messages(CountTokensRequest, body | {"stream": True})


def test_thinking_is_switched_by_the_templates_variable() -> None:
    def variables(name: str, kind: str) -> dict[str, Any]:
        of = tokenizer(name)
        return thinking_variables(ThinkingOptions.model_validate({"type": kind}), of, answer_format(of))

    assert variables("qwen3", "disabled") == {"enable_thinking": False}
    assert variables("qwen3", "adaptive") == {"enable_thinking": True}
    assert variables("qwen2_5", "enabled") == variables("qwen2_5", "disabled") == {}


# ---- answers ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"at": "me"}', {"at": "me"}),
        ('{"at": "m', {}),
        ("[1]", {}),
        ('{"at": "\\ud800"}', {}),
        ('{"at": 1e999}', {}),
        ("{" + '"a":{' * 5000 + "}" * 5001, {}),
        ('{"at": ' + "9" * 5000 + "}", {}),
    ],
)
def test_the_input_of_a_call_can_always_be_sent(arguments: str, expected: dict[str, Any]) -> None:
    """A model's rubbish is no mistake of the server's."""
    writer = MessageWriter("a", "m")
    for event in (CallBegun(0, "look"), Arguments(0, arguments), CallEnded(0)):
        writer.add(event)
    writer.ending(Ending("stop", None, Usage(1, 0, 1, 0)))
    assert (writer.whole()["content"][0]["input"], writer.whole()["stop_reason"]) == (expected, "tool_use")


@pytest.mark.parametrize(
    ("finish", "stop", "events", "reason", "sequence"),
    [
        ("stop", None, [Said("x")], "end_turn", None),
        ("stop", "X", [Said("x")], "stop_sequence", "X"),
        ("length", None, [Said("x")], "max_tokens", None),
        ("length", None, [CallBegun(0, "f"), CallEnded(0)], "max_tokens", None),
        ("stop", "X", [CallBegun(0, "f"), Arguments(0, "{")], "stop_sequence", "X"),
        ("stop", None, [CallBegun(0, "f"), CallEnded(0), Said("x")], "tool_use", None),
    ],
)
def test_why_an_answer_ends(
    finish: str, stop: str | None, events: list[Any], reason: str, sequence: str | None
) -> None:
    writer = MessageWriter("a", "m")
    for event in events:
        writer.add(event)
    *_, delta, _ = writer.ending(Ending(finish, stop, Usage(7, 3, 2, 0)))
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert delta["usage"] == writer.whole()["usage"]
    assert (delta["usage"]["input_tokens"], delta["usage"]["cache_read_input_tokens"]) == (4, 3)
