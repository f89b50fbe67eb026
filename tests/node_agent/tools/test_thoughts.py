"""What a model thought and what it said are told apart, and calls are looked for in what it said."""

from __future__ import annotations

from pathlib import Path

import pytest
from answers_read import Found, read, read_all_ways
from call_templates import tokenizer
from chat_templates import write_folder
from tokenizers import Tokenizer as Backend

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.generation.transcript import Transcript
from coserve_agent.requests.chat import parse_chat
from coserve_agent.requests.prompts import Prompt
from coserve_agent.requests.reading import reading_of
from coserve_agent.text.marks import NO_MARKS
from coserve_agent.tools.answer_format import answer_format
from coserve_agent.tools.formats import format_of
from coserve_agent.tools.reading import Reading
from coserve_agent.tools.thought_parser import Tags
from coserve_api.endpoint import ToolCallParser
from coserve_engine.messages import Token

TAGS = Tags("<think>", "</think>")
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def thinking(inside: bool) -> Reading:
    form = format_of(ToolCallParser.HERMES, NO_MARKS, tokenizer("qwen3").pieces)
    return Reading(format=form, names=frozenset("f"), tags=TAGS, thinking=inside)


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (False, "<think>\nso <b>\n</think>\n\nhi", Found("hi", "so <b>")),
        (False, "\n<think>a</think>b", Found("b", "a")),
        (False, "<think>\n\n</think>\n\nhi", Found("hi")),
        # without a thought it is content, as where enable_thinking is false
        (False, " hi <think>a</think>", Found(" hi <think>a</think>")),
        (False, "<thin", Found("<thin")),
        (False, "", Found()),
        (True, "so\n\nand\n</think>\n\nhi\n", Found("hi\n", "so\n\nand")),
        (True, "<think>\nso</think>hi", Found("hi", "so")),
        (True, "</think>hi", Found("hi")),
        (True, "so </thin", Found("", "so </thin")),
        (True, f"I call {CALL}</think>\n{CALL}", Found("", f"I call {CALL}", [("f", "{}", True)])),
        (False, f"<think>a</think>\nb\n{CALL}", Found("b", "a", [("f", "{}", True)])),
    ],
)
def test_right_values(inside: bool, text: str, expected: Found) -> None:
    assert read_all_ways(thinking(inside), text) == expected


def test_a_tag_that_is_a_special_token_is_seen_where_a_variable_lets_the_model_think(tmp_path: Path) -> None:
    write_folder(tmp_path, "<|a|>{% if thinking %}<think>{% endif %}", "bytes")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<think>", "</think>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    of = Tokenizer(tmp_path)
    known = answer_format(of)
    assert known.tags is None
    request = parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    how, _ = reading_of(request, known, of, of.encode("<think>"))
    transcript = Transcript(of.pieces, Prompt([5], reading=how), (), 0)
    tokens = of.encode("hm</think>hi", add_special_tokens=False)
    assert read(how, [transcript.push(Token("r", one, None, 0.0)) for one in tokens]) == Found("hi", "hm")


@pytest.mark.parametrize(
    ("name", "tags"),
    [("qwen3", TAGS), ("deepseek_r1_distill", TAGS), ("qwen2_5", None), ("llama3_1", None), ("gemma", None)],
)
def test_whether_a_model_thinks_is_found_by_its_template(name: str, tags: Tags | None) -> None:
    assert answer_format(tokenizer(name)).tags == tags
