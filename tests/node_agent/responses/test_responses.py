"""OpenAI's Responses API through the unmodified client, on models that say what they were made to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from hermes_model import SCRIPTS
from openai.types.responses import Response

AT: dict[str, Any] = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK: dict[str, Any] = {"type": "function", "name": "look", "parameters": AT, "strict": False}
WAIT: dict[str, Any] = {"type": "function", "name": "wait", "parameters": None, "strict": None}
ARGUMENTS = '{"at": "é 😀 me"}'
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def spoken(hermes: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(spoken: openai.OpenAI) -> Ask:
    def ask(said: Any, **more: Any) -> Any:
        given = {"tools": [LOOK, WAIT], "temperature": 0, "max_output_tokens": 100} | more
        return spoken.responses.create(model="base", input=said, **given)

    return ask


def outline(response: Response) -> list[tuple[str, ...]]:
    """What its items say, without their ids."""
    found: list[tuple[str, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.name, item.arguments))
        elif item.type in ("message", "reasoning"):
            found += [(item.type, part.text) for part in item.content]  # type: ignore[union-attr]
    return found


EXPECTED = {
    "[call]": [("look", ARGUMENTS)],
    "[two]": [("message", "Sure."), ("look", "{}"), ("wait", "{}")],
    "[text]": [("message", "just text")],
    "[broken]": [("message", '<tool_call>{"name": "look", oops')],
    "[empty]": [("message", "")],
    "[hm]": [("reasoning", "hm hm"), ("message", "so be it")],
}


@pytest.mark.parametrize("said", SCRIPTS)
def test_an_answer(ask: Ask, said: str) -> None:
    response = ask(said, metadata={"a": "b"}, instructions="be brief")
    assert outline(response) == EXPECTED[said]
    assert (response.status, response.store, response.error, response.incomplete_details) == (
        "completed", False, None, None,
    )  # fmt: skip
    assert (response.metadata, response.instructions, response.tools[0].name) == ({"a": "b"}, "be brief", "look")
    assert {item.status for item in response.output} == {"completed"}
    usage = response.usage
    assert usage.output_tokens == len(SCRIPTS[said]) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == (2 if said == "[hm]" else 0)
    assert Response.model_validate(response.model_dump(), strict=True)


DELTAS = ("response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta")
TEXT = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
THOUGHT = [one.replace("output_text", "reasoning_text") for one in TEXT]
CALL = ["function_call_arguments.delta", "function_call_arguments.done"]
ORDERS = {
    "[call]": [CALL],
    "[two]": [TEXT, CALL, CALL],
    "[text]": [TEXT],
    "[broken]": [TEXT],
    "[empty]": [[one for one in TEXT if "delta" not in one]],
    "[hm]": [THOUGHT, TEXT],
}  # fmt: skip


@pytest.mark.parametrize("said", SCRIPTS)
def test_events_come_in_order_and_say_what_the_answer_says(ask: Ask, said: str) -> None:
    """Each item is added, grows and is done before the next; the response at the end has the same, by the same ids."""
    events = list(ask(said, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds: list[str] = []
    for event in events:
        kind = event.type.removeprefix("response.")
        if kinds[-1:] != [kind] or "delta" not in kind:
            kinds.append(kind)
    inside = [kind for order in ORDERS[said] for kind in ("output_item.added", *order, "output_item.done")]
    assert kinds == ["created", "in_progress", *inside, "completed"]
    final = events[-1].response
    assert outline(final) == EXPECTED[said]
    for n, item in enumerate(final.output):
        of_item = [event for event in events if getattr(event, "output_index", None) == n]
        assert of_item[0].item.id == of_item[-1].item.id == item.id
        assert {event.item_id for event in of_item[1:-1]} == {item.id}
        assert of_item[-1].item == item
        assert of_item[0].item.status == "in_progress"
        whole = "".join(event.delta for event in of_item if event.type in DELTAS)
        assert whole == (item.arguments if item.type == "function_call" else item.content[0].text)
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    alone = ask(said)
    assert (outline(alone), alone.usage.output_tokens_details) == (outline(final), final.usage.output_tokens_details)


def test_the_clients_own_stream_and_parser(spoken: openai.OpenAI) -> None:
    class Look(pydantic.BaseModel):
        at: str

    tool = {**openai.pydantic_function_tool(Look, name="look")["function"], "type": "function"}
    for choice in ("auto", "required"):
        with spoken.responses.stream(
            model="base", input="[call]", tools=[tool], max_output_tokens=50, tool_choice=choice
        ) as stream:
            for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    snapshot = event.snapshot
            final = stream.get_final_response()
        (item,) = final.output
        assert item.type == "function_call" and item.parsed_arguments is not None
        assert (snapshot, item.arguments) == (ARGUMENTS, ARGUMENTS)
    with spoken.responses.stream(model="base", input="[hm]", max_output_tokens=50) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert (snapshots[-1], stream.get_final_response().output_text) == ("so be it", "so be it")


def test_parse_holds_the_answer_to_the_clients_model(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        done: bool
        level: int = pydantic.Field(ge=0, le=9)

    asked: dict[str, Any] = {"model": "base", "input": "the quick", "temperature": 0}
    parsed = client.responses.parse(text_format=Answer, max_output_tokens=220, **asked)
    assert isinstance(parsed.output_parsed, Answer)
    assert parsed.text.format.type == "json_schema"
    free = client.responses.create(text={"format": {"type": "json_object"}}, max_output_tokens=200, **asked)
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


def test_an_answer_that_is_cut_is_incomplete(ask: Ask) -> None:
    cut = ask("[text]", max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == ("incomplete", "max_output_tokens", "just ")
    assert cut.output[0].status == "incomplete"
    *_, last = ask("[text]", max_output_tokens=1, stream=True)
    assert (last.type, last.response.output_text) == ("response.incomplete", "just ")
    held = ask("[call]", max_output_tokens=4, tool_choice="required")
    assert (held.status, held.output[0].status, held.output[0].arguments) == (
        "incomplete",
        "incomplete",
        '{"at": "é 😀 me"',
    )
    stopped = ask("[text]", extra_body={"stop": "ext"})
    assert (stopped.status, stopped.output_text) == ("completed", "just t")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "wait"}])
def test_tool_choice_holds_the_answer_to_calls(ask: Ask, choice: Any) -> None:
    response = ask("[call]", tool_choice=choice, parallel_tool_calls=False)
    (item,) = response.output
    assert (item.type, item.name) == ("function_call", "look" if choice == "required" else "wait")
    assert (response.tool_choice if isinstance(choice, str) else response.tool_choice.model_dump()) == choice


def test_the_loop_of_a_tool(spoken: openai.OpenAI) -> None:
    """As OpenAI's guide has it: the answer's own items go back, and each call's output behind them."""
    items: list[Any] = [{"role": "user", "content": "[call]"}]
    first = spoken.responses.create(model="base", input=items, tools=[LOOK], max_output_tokens=50)
    items += first.output
    for item in first.output:
        assert item.type == "function_call"
        items.append({"type": "function_call_output", "call_id": item.call_id, "output": "[hm]"})
    second = spoken.responses.create(model="base", input=items, tools=[LOOK], max_output_tokens=50)
    assert outline(second) == EXPECTED["[hm]"]
    items += [*second.output, {"role": "user", "content": [{"type": "input_text", "text": "[text]"}]}]
    third = spoken.responses.create(model="base", input=items, tools=[LOOK], max_output_tokens=50)
    assert third.output_text == "just text"


def test_the_prompt_is_that_of_the_chat(hermes: Any, spoken: openai.OpenAI) -> None:
    answer = ask_chat(spoken, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "[text]"}])
    again = spoken.responses.create(model="base", input="[text]", instructions="be brief", tools=[LOOK])
    assert again.usage is not None and again.usage.input_tokens == answer.usage.prompt_tokens


def ask_chat(client: openai.OpenAI, messages: Any) -> Any:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": AT}}
    return client.chat.completions.create(model="base", messages=messages, tools=[tool], max_tokens=10)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input", "'input_image'"),
        ({"max_output_tokens": 1000}, "max_output_tokens", "lower max_output_tokens"),
        ({"input": "one " * 300}, "input", "shorten input"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "function_call", "call_id": "a", "name": "f",
                                                       "arguments": "{"}]}, "input", "arguments '{'"),
        ({"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs", "mood"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "uniqueItems": True,
                     "properties": {"a": {"contains": 1}}}}], "tool_choice": "required"},
         "tools", "tools[0].parameters: the schema's #/"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "array", "uniqueItems": True}}}},
         "text", "text.format.schema: the schema's #/uniqueItems"),
    ],
)  # fmt: skip
def test_errors_name_the_fields_of_this_api(hermes: Any, change: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        answer = httpx.post(
            f"{hermes.url}/v1/responses", json={"model": "base", "input": "x", "stream": stream} | change
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert words in error["message"]


def test_a_template_without_tools_and_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools are not written") as error:
        client.responses.create(model="base", input="x", tools=[LOOK])
    assert error.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="x")
