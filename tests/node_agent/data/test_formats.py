"""Rows as others write them: TRL, OpenAI, ShareGPT, Alpaca; the order in which they are told apart, and what is refused
because it means something that is not done here.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_rows import GOOD, TURNS, learned, reader_of, samples_of

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.formats import REFUSED, detect
from coserve_agent.data.problems import LineError, Reason
from coserve_api.job import DatasetFormat, Learn

SYSTEM = {"role": "system", "content": "fox"}
CHAT_TEXT = "<|user|>one<|end|><|assistant|>two<|end|>"
SHAREGPT = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}
ALPACA = {"instruction": "one", "input": "", "output": "two"}
TOOLS = [{"type": "function", "function": {"name": "fox", "parameters": {}}}]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (GOOD, DatasetFormat.MESSAGES),
        ({**GOOD, "prompt": "x", "prompt_id": "y"}, DatasetFormat.MESSAGES),  # UltraChat
        ({**GOOD, **SHAREGPT}, DatasetFormat.MESSAGES),
        (SHAREGPT, DatasetFormat.SHAREGPT),
        ({"prompt": "a", "completion": "b", "text": "ab"}, DatasetFormat.PROMPT_COMPLETION),
        (ALPACA, DatasetFormat.ALPACA),
        ({**ALPACA, "text": "### Instruction: one"}, DatasetFormat.ALPACA),  # tatsu-lab/alpaca
        ({"text": "one", "label": 1}, DatasetFormat.TEXT),
    ],
)
def test_the_order_of_detection(row: dict[str, Any], format: DatasetFormat) -> None:
    assert detect(row) is format


def test_a_null_field_decides_nothing(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, {"messages": None, "conversations": None, **ALPACA})[0] == CHAT_TEXT


COLUMNS: dict[str, Any] = {
    "messages": [],
    "conversations": [],
    "prompt": "",
    "completion": "",
    "instruction": "",
    "input": "",
    "output": "",
    "text": "",
}
"""Of a table that was put together from data sets of all formats."""
FILLED = [
    ({"messages": GOOD["messages"]}, DatasetFormat.MESSAGES),
    ({"conversations": SHAREGPT["conversations"]}, DatasetFormat.SHAREGPT),
    ({"prompt": "one", "completion": "two"}, DatasetFormat.PROMPT_COMPLETION),
    ({"completion": "two words"}, DatasetFormat.PROMPT_COMPLETION),
    ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, DatasetFormat.PROMPT_COMPLETION),
    ({"instruction": "one", "output": "two"}, DatasetFormat.ALPACA),
    ({"input": "one", "output": "two"}, DatasetFormat.ALPACA),
    ({"text": "one"}, DatasetFormat.TEXT),
]


OWN = {DatasetFormat.PROMPT_COMPLETION: {"prompt": ""}, DatasetFormat.ALPACA: {"instruction": "", "input": ""}}
"""What may be empty in a row of a format."""


@pytest.mark.parametrize("empty", [None, "", [], {}, " \n"], ids=repr)
@pytest.mark.parametrize(("filled", "format"), FILLED, ids=str)
def test_empty_columns_of_other_formats_decide_nothing(
    tokenizer: Tokenizer, filled: dict[str, Any], format: DatasetFormat, empty: object
) -> None:
    alone = {**OWN.get(format, {}), **filled}
    row = {**dict.fromkeys(COLUMNS, empty), **alone}
    assert detect({name: value for name, value in row.items() if value is not None}) is format
    assert samples_of(tokenizer, row) == samples_of(tokenizer, alone)


def test_of_two_filled_formats_the_order_decides() -> None:
    order = [DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.ALPACA]
    for n, (first, format) in enumerate(FILLED):
        for second, other in FILLED[n:]:
            assert detect({**COLUMNS, **second, **first}) is format, (format, other)
    assert list(dict.fromkeys(format for _, format in FILLED)) == [*order, DatasetFormat.TEXT]


def test_a_row_of_empty_columns_is_told_of_the_first(tokenizer: Tokenizer) -> None:
    with pytest.raises(LineError, match=r"messages is \[\]; it must be a list"):
        samples_of(tokenizer, COLUMNS)


def test_a_line_of_another_format_is_told_so(tokenizer: Tokenizer) -> None:
    """A data set has one format; a line that fills another column than the first did is no silent loss."""
    with pytest.raises(LineError, match="is of format text, and this data set is read as messages") as caught:
        samples_of(tokenizer, {**COLUMNS, "text": "one two"}, format=DatasetFormat.MESSAGES)
    assert caught.value.reason is Reason.FIELD


@pytest.mark.parametrize("row", [{"question": "a", "answer": "b"}, {}, {"prompt": "a"}, {"instruction": "a"}])
def test_a_row_of_no_format_is_told_the_formats(tokenizer: Tokenizer, row: Any) -> None:
    with pytest.raises(LineError, match="it must have messages, conversations, prompt and completion, instr") as caught:
        samples_of(tokenizer, row)
    assert caught.value.reason is Reason.NO_FORMAT


# ---- conversations ----


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        SHAREGPT,
        {"conversations": TURNS[:2]},
        {"conversations": [{"from": "user", "value": "one"}, {"from": "assistant", "value": "two", "weight": None}]},
        {"prompt": TURNS[:1], "completion": TURNS[1:2]},
        ALPACA,
        {"instruction": "one", "output": "two"},
        {"instruction": "", "input": "one", "output": "two"},
    ],
    ids=str,
)
def test_a_conversation_is_the_same_however_it_is_written(tokenizer: Tokenizer, row: Any) -> None:
    assert learned(tokenizer, row) == (CHAT_TEXT, "two<|end|>")


def test_instruction_and_input_are_one_message(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, {**ALPACA, "input": "three"})[0] == CHAT_TEXT.replace("one", "one\nthree")


def test_system_tools_and_history_of_other_formats(rich: Tokenizer) -> None:
    more = {"system": "dog", "tools": json.dumps(TOOLS)}
    text = "<|user|>[fox ]<|end|><|user|>(dog)<|end|>" + CHAT_TEXT
    assert learned(rich, {**SHAREGPT, **more}) == (text, "two<|end|>")
    assert learned(rich, {**ALPACA, **more}) == (text, "two<|end|>")
    history = {**ALPACA, "history": [["three", "four"]]}
    text = "<|user|>three<|end|><|assistant|>four<|end|>" + CHAT_TEXT
    assert learned(rich, history) == (text, "four<|end|>two<|end|>")
    assert learned(rich, history, learn=Learn.LAST) == (text, "two<|end|>")


def test_calls_of_sharegpt(rich: Tokenizer) -> None:
    turns = [
        {"from": "human", "value": "one"},
        {"from": "function_call", "value": '{"name": "fox", "arguments": {"x": "dog"}}'},
        {"from": "observation", "value": "three"},
        {"from": "gpt", "value": "two"},
    ]
    text, part = learned(rich, {"conversations": turns})
    assert text == "<|user|>one<|end|><|assistant|>!foxdog<|end|><|user|>=three<|end|><|assistant|>two<|end|>"
    assert part == "!foxdog<|end|>two<|end|>"


def test_only_the_completion_of_messages_is_learned(rich: Tokenizer) -> None:
    row = {"prompt": TURNS[:3], "completion": TURNS[3:], "tools": TOOLS}
    text, part = learned(rich, row)
    assert text.startswith("<|user|>[fox ]<|end|>")
    assert part == "four é😀<|end|>"
    with pytest.raises(LineError, match=r"completion\[0\] is an empty answer"):
        samples_of(rich, {**row, "completion": [{"role": "assistant", "content": ""}]})
    with pytest.raises(LineError, match="completion has no assistant message that is learned"):
        samples_of(rich, {**row, "completion": TURNS[:1]})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "bard", "value": "x"}]}, r"conversations\[0\].from is 'bard'; it must be one of"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value is missing"),
        ({"conversations": [{"from": "human", "value": "x", "role": "user"}]}, "has role beside from and value"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "no JSON"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "a function_call is"),
        ({"conversations": [{"from": "function_call", "value": '{"x": 1}'}]}, "a function_call is"),
        ({"conversations": [{"from": "gpt", "value": "x", "markdown": 1}]}, r"conversations\[0\].markdown is 1"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "system": 3}, "system is 3; it must be a string"),
        ({"conversations": [SYSTEM, *TURNS[:2]], "system": "dog"}, "another in system; keep one"),
        ({"conversations": "one"}, "conversations is 'one'; it must be a list"),
        ({**ALPACA, "output": ""}, "output is empty"),
        ({**ALPACA, "output": 5}, "output is 5"),
        ({**ALPACA, "instruction": ""}, "instruction is empty"),
        ({**ALPACA, "input": ["x"]}, r"input is \['x'\]"),
        ({**ALPACA, "history": [["one"]]}, "pairs of strings"),
        ({**ALPACA, "history": "one"}, "history is 'one'"),
        ({"prompt": "one", "completion": TURNS[1:2]}, "a string and a list"),
        ({"prompt": "one", "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "two"}, "prompt is 3; it must be a string"),
        ({"text": ""}, "text is empty"),
        ({"text": "one", "tools": TOOLS}, "tools goes with messages"),
        ({**GOOD, "tools": "x"}, "tools is 'x', no JSON"),
        ({**GOOD, "tools": {"a": 1}}, "tools is {'a': 1}; it must be OpenAI's list"),
        ({**GOOD, "tools": [{"type": "function"}]}, r"tools\[0\] is "),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_names_its_field(rich: Tokenizer, row: Any, words: str) -> None:
    with pytest.raises(LineError, match=words):
        samples_of(rich, row)


# ---- fields of a row ----


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_means_something_else_is_refused(tokenizer: Tokenizer, field: str) -> None:
    for row in (GOOD, SHAREGPT, ALPACA, {"prompt": "a", "completion": "b"}, {"text": "one"}):
        with pytest.raises(LineError, match=f"^{field} .*; remove the field$") as caught:
            samples_of(tokenizer, {**row, field: ["x"]})
        assert caught.value.reason is Reason.UNSUPPORTED
        assert samples_of(tokenizer, {**row, field: []}) == samples_of(tokenizer, row), "empty is not there"


def test_a_preference_row_is_told_what_it_is(tokenizer: Tokenizer) -> None:
    with pytest.raises(LineError, match=r"^chosen belongs to a preference row"):
        samples_of(tokenizer, {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(LineError, match=r"^label belongs to a preference row"):
        samples_of(tokenizer, {"prompt": "a", "completion": "b", "label": False})


def test_other_fields_are_named(tokenizer: Tokenizer) -> None:
    row = {**GOOD, "id": 5, "source": "x", "empty": "", "null": None, "parallel_tool_calls": False, "tools": []}
    reader = reader_of(tokenizer, format=DatasetFormat.MESSAGES)
    assert reader.read(1, json.dumps(row).encode()).unknown == ("id", "source")
