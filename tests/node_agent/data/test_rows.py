"""What a message of a row may hold, and which answers are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import TURNS, learned, line_of, reader_of, samples_of

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.problems import LineError, Reason
from coserve_agent.data.reader import NAME
from coserve_api.job import Learn

USER = {"role": "user", "content": "one"}
TOOL = {"type": "function", "function": {"name": "fox", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "fox", "arguments": '{"x": "dog"}'}}


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": "two", **fields}]}


def weighed(*weights: Any, field: str = "weight") -> dict[str, Any]:
    """TURNS with these weights of the answers; None: none is written."""
    answers = iter(weights)
    return {
        "messages": [
            turn if turn["role"] == "user" or (weight := next(answers)) is None else {**turn, field: weight}
            for turn in TURNS
        ]
    }


# ---- which answers are learned ----


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (weighed(None, None), "two<|end|>four é😀<|end|>"),
        (weighed(0, None), "four é😀<|end|>"),
        (weighed(0.0, 1.0), "four é😀<|end|>"),
        (weighed(1, 0), "two<|end|>"),
        (weighed(False, True, field="train"), "four é😀<|end|>"),
    ],
)
def test_weights_say_what_is_learned(tokenizer: Tokenizer, row: Any, part: str) -> None:
    text, got = learned(tokenizer, row)
    assert got == part
    assert learned(tokenizer, {"messages": TURNS})[0].startswith(text), "the context stays the same"


def test_the_last_answer_alone(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, {"messages": TURNS}, learn=Learn.LAST)[1] == "four é😀<|end|>"
    with pytest.raises(LineError, match=r"no assistant message that is learned \(weight, train, dataset.learn Last\)"):
        samples_of(tokenizer, weighed(1, 0), learn=Learn.LAST)


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (weighed(0, 0), Reason.NOTHING_TO_LEARN, "no assistant message that is learned"),
        (weighed(0.5, None), Reason.FIELD, r"messages\[1\].weight is 0.5: .*a weight is 0 or 1"),
        (weighed(True, None), Reason.FIELD, r"messages\[1\].weight is True"),
        (weighed("0", None), Reason.FIELD, r"messages\[1\].weight is '0'"),
        (weighed(0, None, field="train"), Reason.FIELD, r"messages\[1\].train is 0: .*true or false"),
        ({"messages": [{**USER, "weight": 1}, TURNS[1]]}, Reason.UNSUPPORTED, r"messages\[0\].weight asks to learn"),
        ({"messages": [{**USER, "train": True}, TURNS[1]]}, Reason.UNSUPPORTED, r"messages\[0\].train asks to learn"),
    ],
)
def test_a_weight_that_cannot_be_honoured_is_refused(
    tokenizer: Tokenizer, row: Any, reason: Reason, words: str
) -> None:
    with pytest.raises(LineError, match=words) as caught:
        samples_of(tokenizer, row)
    assert caught.value.reason is reason


def test_a_prompts_weight_of_nothing_changes_nothing(tokenizer: Tokenizer) -> None:
    row = {"messages": [{**USER, "weight": 0}, TURNS[1]]}
    assert learned(tokenizer, row)[1] == "two<|end|>"


# ---- fields of a message ----


@pytest.mark.parametrize("field", ["thinking", "function_call", "refusal", "audio", "id", "contents", "prefix"])
def test_a_field_that_is_not_known_is_refused_unless_it_is_null(tokenizer: Tokenizer, field: str) -> None:
    with pytest.raises(
        LineError, match=rf"messages\[1\].{field} is .*no field that is known here; remove it"
    ) as caught:
        samples_of(tokenizer, said(**{field: "x"}))
    assert caught.value.reason is Reason.UNKNOWN_FIELD
    assert learned(tokenizer, said(**{field: None})) == learned(tokenizer, said())


def names_of(row: dict[str, Any], **names: str | None) -> dict[str, Any]:
    """The row, its messages with the names of their roles."""
    return {"messages": [{**one, "name": names[one["role"]]} for one in row["messages"]]}


def test_a_name_that_the_template_does_not_write_is_counted(
    tokenizer: Tokenizer, with_template: Callable[[str], Tokenizer]
) -> None:
    """A request's is left out in the same way, so what is learned is still what is served."""
    raw = line_of(names_of(said(), user="dog", assistant="fox"))
    reading = reader_of(tokenizer).detected(raw).read(1, raw)
    assert (reading.unknown, reading.refused) == ((NAME,), ())
    assert reading.samples == samples_of(tokenizer, said())
    for row in (said(), names_of(said(), user=None, assistant=None)):
        raw = line_of(row)
        assert reader_of(tokenizer).detected(raw).read(1, raw).unknown == ()
    naming = with_template("{% for m in messages %}{{ m.name }}:{{ m.content }}<|end|>{% endfor %}")
    raw = line_of(names_of(said(), user="dog", assistant="fox"))
    assert reader_of(naming).detected(raw).read(1, raw).unknown == ()
    assert "dog:one" in learned(naming, names_of(said(), user="dog", assistant="fox"))[0]


def test_calls_and_their_results_are_written(rich: Tokenizer) -> None:
    row = {
        "tools": [TOOL],
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "four", "tool_call_id": "c1", "name": "fox"},
            {"role": "assistant", "content": "two", "annotations": [], "tool_calls": None},
        ],
    }
    text, part = learned(rich, row)
    assert text == (
        "<|user|>[fox ]<|end|><|user|>one<|end|><|assistant|>!foxdog<|end|><|user|>=four<|end|><|assistant|>two<|end|>"
    )
    assert part == "!foxdog<|end|>two<|end|>"
    as_object = {**CALL, "function": {"name": "fox", "arguments": {"x": "dog"}}}
    row["messages"][1] = {"role": "assistant", "tool_calls": [as_object]}
    assert learned(rich, row) == (text, part)


def test_reasoning_is_part_of_the_answer(rich: Tokenizer) -> None:
    assert learned(rich, said(reasoning_content="fox"))[1] == "~fox~two<|end|>"
    assert learned(rich, said(reasoning_content="fox", content=None))[1] == "~fox~<|end|>"


def test_parts_of_text_are_joined_as_the_server_joins_them(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "four"}]
    assert learned(tokenizer, said(content=parts)) == learned(tokenizer, said(content="two\nfour"))


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (said(tool_calls=[CALL]), Reason.UNSUPPORTED, "tool_calls, which this model's chat template does not write"),
        (said(reasoning_content="x"), Reason.UNSUPPORTED, "reasoning_content, which this model's chat template does"),
        ({**said(), "tools": [TOOL]}, Reason.UNSUPPORTED, "chat template does not write tools"),
        (said(content=[{"type": "image_url", "image_url": {}}]), Reason.UNSUPPORTED, "part of type 'image_url'"),
        (said(content=[{"type": "text", "text": 5}]), Reason.FIELD, "whose text is 5"),
        ({"messages": [{"role": "user"}, TURNS[1]]}, Reason.FIELD, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": None}, TURNS[1]]}, Reason.FIELD, r"\[0\].content is missing"),
    ],
)
def test_what_the_template_would_lose_is_refused(tokenizer: Tokenizer, row: Any, reason: Reason, words: str) -> None:
    with pytest.raises(LineError, match=words) as caught:
        samples_of(tokenizer, row)
    assert caught.value.reason is reason


@pytest.mark.parametrize("arguments", ["{", '{"x": NaN}', '{"x": 1, "x": 2}', "[" * 100_000])
def test_arguments_are_json(rich: Tokenizer, arguments: str) -> None:
    call = {**CALL, "function": {"name": "fox", "arguments": arguments}}
    with pytest.raises(LineError, match=r"'fox' with arguments .*no JSON"):
        samples_of(rich, said(tool_calls=[call]))


@pytest.mark.parametrize(
    "answer", [{"content": ""}, {"content": " \n"}, {"content": None}, {}, {"content": []}, {"content": [""]}]
)
def test_an_empty_answer_is_refused(rich: Tokenizer, answer: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    with pytest.raises(LineError, match=r"messages\[1\] is an empty answer") as caught:
        samples_of(rich, row)
    assert caught.value.reason is Reason.EMPTY_ANSWER
    told = {"messages": [USER, {"role": "assistant", "weight": 0, **answer}, USER, TURNS[1]]}
    assert learned(rich, told)[1] == "two<|end|>", "what is not learned may be empty"


@pytest.mark.parametrize(
    "row", [{"prompt": "one", "completion": " "}, {"text": "\n"}, {"instruction": "one", "output": " "}]
)
def test_spaces_are_no_answer(tokenizer: Tokenizer, row: Any) -> None:
    with pytest.raises(LineError, match="is empty") as caught:
        samples_of(tokenizer, row)
    assert caught.value.reason is Reason.EMPTY_ANSWER


# ---- roles ----


def test_a_role_that_the_template_skips_is_refused(rich: Tokenizer) -> None:
    with pytest.raises(LineError, match="message 0 has role 'critic', which this model's chat template does not write"):
        samples_of(rich, {"messages": [{"role": "critic", "content": "x"}, *TURNS[:2]]})


def test_a_developer_is_the_system_where_the_template_knows_no_other(rich: Tokenizer) -> None:
    for role in ("developer", "system"):
        row = {"messages": [{"role": role, "content": "fox"}, *TURNS[:2]]}
        assert learned(rich, row)[0].startswith("<|user|>(fox)<|end|>")


# ---- what nothing stands before ----


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "", "completion": "4"}, "nothing stands before its only token"),
        ({"prompt": "", "completion": "4<|end|>"}, "nothing stands before its only token"),
        ({"prompt": "", "completion": "<|end|>"}, "give it a prompt"),
        ({"prompt": "one", "completion": "<|end|>"}, "an answer's end alone; give it more"),
        (said(content="<|end|>"), "an answer's end alone"),
    ],
    ids=str,
)
def test_an_end_alone_is_no_answer(tokenizer: Tokenizer, row: Any, words: str) -> None:
    """This tokenizer begins a text with no token, so nothing could predict the "4"."""
    with pytest.raises(LineError, match=words) as caught:
        samples_of(tokenizer, row)
    assert caught.value.reason is Reason.NOTHING_TO_LEARN


@pytest.mark.parametrize("row", [{"prompt": "", "completion": "4"}, {"text": "4"}], ids=str)
def test_one_token_alone_is_nothing_to_learn(tmp_path: Path, model_folder: Path, row: Any) -> None:
    """Without an end token nothing follows it either."""
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    with pytest.raises(LineError) as caught:
        samples_of(Tokenizer(tmp_path), row)
    assert caught.value.reason is Reason.NOTHING_TO_LEARN


def test_a_text_of_one_token_teaches_that_it_ends(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, {"text": "4"}) == ("4<|end|>", "<|end|>")


@pytest.mark.parametrize("row", [{"prompt": "", "completion": "4"}, {"text": "4"}], ids=str)
def test_one_token_behind_a_begin_is_learned(sentencepiece_tokenizer: Tokenizer, row: Any) -> None:
    """The begin token predicts it, as it does where the server is asked with an empty prompt."""
    assert learned(sentencepiece_tokenizer, row) == ("<s> 4</s>", "4</s>")


def test_more_behind_an_empty_prompt_is_learned_but_for_its_first_token(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, {"prompt": "", "completion": "4 two"}) == ("4 two<|end|>", " two<|end|>")
