"""Items of a conversation as messages of a chat, and what a request may say: without an agent."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_agent.http.errors import ApiError
from coserve_agent.http.renamed import renaming
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.responses.request import FIELDS, parse_responses

GOOD: dict[str, Any] = {"model": "m", "input": "x"}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": None}


def of_chat(*, thoughts: bool = True, **change: Any) -> ChatRequest:
    asked = parse_responses(GOOD | change)
    with renaming(FIELDS):
        return asked.of_chat(thoughts=thoughts)


def messages(given: Any, thoughts: bool = True, **more: Any) -> list[dict[str, Any]]:
    return [one.model_dump(exclude_unset=True) for one in of_chat(input=given, thoughts=thoughts, **more).messages]


def call(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "look", "arguments": arguments, "id": f"fc_{id}"}


def output(id: str, said: Any = "there") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": said}


USER = {"role": "user", "content": "x"}
SAID = [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}]
MESSAGE = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": SAID}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def test_texts_and_instructions() -> None:
    assert messages("x") == [USER]
    assert messages([USER], instructions="be brief") == [{"role": "system", "content": "be brief"}, USER]
    system = {"role": "developer", "content": "and kind"}
    assert messages([system, USER], instructions="be brief")[0]["content"] == "be brief\n\nand kind"
    parts = {"role": "system", "content": [{"type": "input_text", "text": "and kind"}]}
    joined = messages([parts, USER], instructions="be brief")[0]["content"]
    assert "".join(part["text"] for part in joined) == "be brief\n\nand kind"


def test_a_turn_of_several_items_is_one_message() -> None:
    found = messages([USER, THOUGHT, MESSAGE, call("a"), call("b"), output("a"), output("b", [SAID[0]]), USER])
    assert [one["role"] for one in found] == ["user", "assistant", "tool", "tool", "user"]
    turn = found[1]
    assert (turn["content"], turn["reasoning_content"]) == (SAID, "hm")
    assert [one["id"] for one in turn["tool_calls"]] == ["a", "b"]
    assert found[2] == {"role": "tool", "tool_call_id": "a", "name": "look", "content": "there"}
    assert found[3]["content"] == [SAID[0]]


def test_calls_before_the_text_and_calls_behind_their_results_keep_their_turns() -> None:
    found = messages([USER, call("a"), MESSAGE, output("a"), call("b"), output("b"), MESSAGE, MESSAGE])
    assert [one["role"] for one in found] == [
        "user", "assistant", "tool", "assistant", "tool", "assistant", "assistant",
    ]  # fmt: skip
    assert (found[1]["content"], len(found[1]["tool_calls"])) == (SAID, 1)


def test_thoughts_are_left_out_where_the_template_writes_none() -> None:
    found = messages([USER, THOUGHT, MESSAGE, USER], thoughts=False)
    assert found[1] == {"role": "assistant", "content": SAID}
    hidden = {
        "type": "reasoning",
        "id": "r",
        "summary": [{"type": "summary_text", "text": "s"}],
        "encrypted_content": "e",
    }
    assert messages([USER, hidden, MESSAGE]) == messages([USER, MESSAGE])


def test_sampling_tools_and_form_are_those_of_a_chat() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    asked = of_chat(
        temperature=0, top_p=0.5, seed=3, stop="x", max_output_tokens=7, tool_choice="none", tools=[LOOK],
        parallel_tool_calls=False, text={"format": form}, stream=True, top_k=2, metadata={"a": "b"}, store=True,
        reasoning={"effort": None, "summary": "auto"}, include=["reasoning.encrypted_content"],
    )  # fmt: skip
    assert (asked.temperature, asked.top_p, asked.seed, asked.stop, asked.max_tokens) == (0, 0.5, 3, ["x"], 7)
    assert (asked.stream, asked.top_k, asked.parallel_tool_calls, asked.tool_choice) == (True, 2, False, "none")
    assert asked.response_format is not None and asked.response_format.json_schema is not None
    assert asked.response_format.json_schema.schema_ == {"type": "object"}
    assert asked.tools is not None and asked.tools[0].function.name == "look"
    named = of_chat(tools=[LOOK], tool_choice={"type": "function", "name": "look"})
    assert named.callable == {"look": 0} and named.must_call


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the conversation so far in input"),
        ({"conversation": "c"}, "conversation", "send the conversation so far in input"),
        ({"background": True}, "background", "set stream"),
        ({"prompt": {"id": "p"}}, "prompt", "send instructions and input"),
        ({"truncation": "auto"}, "truncation", "shorten input"),
        ({"top_logprobs": 2}, "top_logprobs", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "message.output_text.logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "effort"),
        ({"text": {"verbosity": "low"}}, "text", "verbosity"),
        ({"messages": []}, "messages", "no parameter of this API"),
        ({"n": 2}, "n", "no parameter of this API"),
        *(
            ({"tools": [{"type": one, "server_label": "s"}]}, "tools", f"tools of type '{one}' are not there")
            for one in ("web_search", "file_search", "code_interpreter", "mcp", "computer_use_preview", "custom")
        ),
        ({"tools": [{"type": "image_generation"}]}, "tools", "'image_generation'"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools", "tools.0.name is missing"),
        ({"tools": [LOOK, LOOK]}, "tools", "two functions"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice", "fly"),
        ({"tools": [LOOK], "tool_choice": {"type": "web_search_preview"}}, "tool_choice", "function"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [USER] * 4097}, "input", "4096"),
        ({"input": 5}, "input", "list"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "input", "no item of a type that is supported"),
        ({"input": [{"type": "item_reference", "id": "w"}]}, "input", "no item of a type that is supported"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "input.0.role"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input.0.content"),
        ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input", "input.0.mood"),
        ({"input": [USER, output("a")]}, "input", "input[1].call_id is 'a', and no function_call before it"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "name and schema are both needed"),
        ({"text": {"format": {"type": "text", "name": "n"}}}, "text", "name given"),
        ({"metadata": {"a": 1}}, "metadata", "metadata.a"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as error:
        of_chat(**change)
    assert (error.value.status, error.value.param) == (400, param)
    assert words in str(error.value)


NULLS = ("previous_response_id", "conversation", "background", "prompt", "truncation", "tools", "metadata", "text")
OFF = {
    "background": False,
    "truncation": "disabled",
    "store": False,
    "user": "u",
    "prompt_cache_key": "k",
    "include": [],
}


@pytest.mark.parametrize("change", [dict.fromkeys(NULLS), OFF])
def test_what_asks_for_nothing_is_taken(change: dict[str, Any]) -> None:
    of_chat(**change)


def test_renaming_leaves_what_is_quoted() -> None:
    with pytest.raises(ApiError) as error, renaming(FIELDS):
        said = "messages has 'messages' in it; the model's messages, max_tokens, x.messages, a[0].function.parameters"
        raise ApiError(400, said, param="messages")
    assert str(error.value) == (
        "input has 'messages' in it; the model's input, max_output_tokens, x.messages, a[0].parameters"
    )
    assert error.value.param == "input"
