"""What a request may say of tools, and how an answer with calls is written: without an agent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from answers_read import cuts
from call_templates import tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage

from coserve_agent.http.errors import ApiError
from coserve_agent.openai.message import Message
from coserve_agent.requests.chat import parse_chat
from coserve_agent.requests.reading import check_offer, reading_of
from coserve_agent.tools.answer_format import answer_format
from coserve_agent.tools.reading import Reading

PARAMETERS = {"type": "object", "properties": {"at": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": PARAMETERS}}
BARE = {"type": "function", "function": {"name": "wait-1_a"}}
GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL, BARE]}
LOOK = {"type": "function", "function": {"name": "look"}}


def refused(name: str = "qwen2_5", **change: Any) -> tuple[str | None, str | None, str]:
    with pytest.raises(ApiError) as error:
        check_offer(parse_chat(GOOD | change), answer_format(tokenizer(name)))
    assert error.value.status == 400
    return error.value.param, error.value.code, str(error.value)


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "type"),
        ({"tools": [{"type": "function"}]}, "tools", "function is missing"),
        ({"tools": TOOL}, "tools", "list"),
        (function(name="two words"), "tools", "tools.0.function.name"),
        (function(name="x" * 65), "tools", "tools.0.function.name"),
        (function(parameters=[]), "tools", "parameters"),
        (function(parameters={"type": "array"}), "tools", "arguments are an object"),
        (function(strict="yes"), "tools", "strict"),
        (function(more=1), "tools", "more"),
        ({"tools": [TOOL, TOOL]}, "tools", "two functions named 'look'"),
        ({"tools": [{**BARE, "function": {"name": f"f{n}"}} for n in range(129)]}, "tools", "128"),
        ({"tool_choice": "any"}, "tool_choice", "'auto'"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "it has look, wait-1_a"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": None, "tool_choice": LOOK}, "tool_choice", "there are no tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "bool"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "set one of them"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools, which replaced it"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice, which replaced it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "tool_choice to 'none'"),
        ({"guided_regex": "a"}, "guided_regex", "tool_choice to 'none'"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, words: str) -> None:
    name, _, message = refused(**change)
    assert name == param
    assert words in message


@pytest.mark.parametrize("change", [{"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"}])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1"])
def test_what_asks_for_nothing_is_taken(name: str, change: dict[str, Any]) -> None:
    check_offer(parse_chat(GOOD | change), answer_format(tokenizer(name)))


def test_tools_that_a_model_cannot_be_shown_or_not_be_heard_on_are_refused() -> None:
    assert refused("phi3")[:2] == ("tools", "unsupported_parameter")
    assert "would not see them" in refused("phi3")[2]
    assert "engine.toolCallParser" in refused("qwen3_5_think")[2]
    check_offer(parse_chat(GOOD | {"tool_choice": "none"}), answer_format(tokenizer("qwen3_5_think")))


def test_a_template_gets_tools_as_the_client_has_them() -> None:
    asked = parse_chat(GOOD | {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}, BARE]})
    assert [tool.shown() for tool in asked.tools or ()] == [TOOL, BARE]


# ---- answers ----

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é \\" me"}}\n</tool_call>'


def reading(**change: Any) -> Reading:
    of = tokenizer("qwen3")
    return reading_of(parse_chat(GOOD | change), answer_format(of), of, of.encode("x"))[0]


def streamed(how: Reading, pieces: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """The message put together as clients do it, its deltas, and whether it ends with calls."""
    message = Message(how)
    deltas = [delta for one in pieces for delta in message.deltas(one, ended=False)]
    deltas += message.deltas("", ended=True)
    whole: dict[str, Any] = {}
    for delta in deltas:
        for name in delta.keys() - {"tool_calls"}:
            whole[name] = whole.get(name, "") + delta[name]
        for part in delta.get("tool_calls", ()):
            calls = whole.setdefault("tool_calls", [])
            if part["index"] == len(calls):
                assert part["function"]["arguments"] == "" and part["type"] == "function"
                calls.append({name: value for name, value in part.items() if name != "index"})
            else:
                assert part.keys() == {"index", "function"} and part["function"].keys() == {"arguments"}
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return whole, deltas, message.calls


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [one["function"] for one in message.get("tool_calls", ())]
    return {name: value for name, value in message.items() if name in ("content", "reasoning_content") and value} | {
        "calls": calls
    }


TEXTS = [
    "hi",
    "",
    CALL,
    f"Sure.\n{CALL}\n{CALL}",
    f"<think>\nhm\n</think>\n\n{CALL}",
    "<think>hm",
    CALL[:-20],
    f"{CALL} so",
]


@pytest.mark.parametrize("text", TEXTS)
@given(at_once=st.integers(1, 30))
def test_deltas_joined_are_the_whole(text: str, at_once: int) -> None:
    for how in (reading(), reading(parallel_tool_calls=False), reading(tool_choice="none")):
        whole = Message(how).whole(text)
        joined, deltas, _ = streamed(how, cuts(text, at_once))
        assert without_ids(joined) == without_ids(whole)
        ChatCompletionMessage.model_validate(whole, strict=True)
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            chunk = {"id": "c", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
            ChatCompletionChunk.model_validate(chunk)


def test_right_values_of_a_message() -> None:
    whole = Message(reading()).whole(f"Sure.\n{CALL}\n{CALL}")
    assert whole["content"] == "Sure."
    first, second = whole["tool_calls"]
    assert first["function"] == second["function"] == {"name": "look", "arguments": '{"at": "é \\" me"}'}
    assert first["id"] != second["id"]
    assert all(len(one["id"]) == 9 and one["id"].isascii() and one["id"].isalnum() for one in (first, second))
    assert "reasoning_content" not in whole
    assert Message(reading()).whole(CALL)["content"] is None
    assert Message(reading()).whole("")["content"] == ""
    thought = Message(reading()).whole("<think>\nhm\n</think>\n\nhi")
    assert (thought["content"], thought["reasoning_content"]) == ("hi", "hm")
    assert Message(reading()).whole("<think>hm")["content"] is None
    assert len(Message(reading(parallel_tool_calls=False)).whole(f"{CALL}{CALL}")["tool_calls"]) == 1
    none = Message(reading(tool_choice="none")).whole(CALL)
    assert (none["content"], none.get("tool_calls")) == (CALL, None)


def test_ids_are_such_as_every_template_takes() -> None:
    """Mistral's want nine letters and digits; sent back with the result, each template writes the message."""
    (call,) = Message(reading()).whole(CALL)["tool_calls"]
    made = {**call, "function": {"name": "look", "arguments": json.loads(call["function"]["arguments"])}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": call["id"], "content": "found"},
    ]
    for name in ("mistral_array", "mistral_named", "qwen3", "llama3_1"):
        assert "found" in tokenizer(name).render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("form", [{"response_format": {"type": "json_object"}}, {"guided_choice": ["a"]}])
def test_an_answer_in_a_form_of_the_clients_is_all_content(form: dict[str, Any]) -> None:
    """It has no room for a thought, also where the prompt opens one: vLLM gave null for content."""
    of = tokenizer("deepseek_r1_distill")
    prompt = of.encode_chat(GOOD["messages"])
    known = answer_format(of)
    plain, held = (reading_of(parse_chat(GOOD | {"tools": []} | more), known, of, prompt)[0] for more in ({}, form))
    assert Message(plain).whole("{}")["reasoning_content"] == "{}"
    assert held.plain


@pytest.mark.parametrize(("text", "calls"), [(CALL, True), ("hi", False), (CALL[:-20], False), (f"{CALL} so", True)])
def test_only_what_has_calls_ends_with_calls(text: str, calls: bool) -> None:
    assert streamed(reading(), [text])[2] == calls
    assert not streamed(reading(tool_choice="required"), [CALL[:-30]])[2]
