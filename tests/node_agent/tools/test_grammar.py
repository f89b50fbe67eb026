"""An answer that is held to calls is calls: whatever is chosen of what a grammar lets follow, the parser of the model's
form reads it, with arguments that the function's schema allows; and what the model's template writes may be chosen.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jsonschema
import pytest
from answers_read import Found, read
from call_templates import FORMATS, templates, written
from chat_templates import write_folder
from grammars import allowed, compiler, matching
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.generation.transcript import Transcript
from coserve_agent.requests.chat import ChatRequest, parse_chat
from coserve_agent.requests.prompts import Prompt
from coserve_agent.requests.reading import reading_of
from coserve_agent.requests.structured import Structure
from coserve_agent.tools.answer_format import AnswerFormat, answer_format
from coserve_agent.tools.reading import Reading
from coserve_engine.grammar.compiler import Compiler
from coserve_engine.messages import FinishReason, Token

MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/letter"}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"letter": {"enum": ["x", "</tool_call>", 'é"']}},
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "look_up"}},
]


class Model:
    """A template with a tokenizer. Where they are `added`, markup is tokens, as in Qwen's, and no special ones."""

    def __init__(self, name: str, added: bool) -> None:
        folder = Path(mkdtemp()) / name
        write_folder(folder, templates()[name], "bytes")
        if added:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
            backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
            backend.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(folder)
        self.format: AnswerFormat = answer_format(self.tokenizer)
        (self.end,) = self.tokenizer.encode("<eos>", add_special_tokens=False)
        self.compiler: Compiler = compiler(folder, 4096, (self.end,))

    def asked(self, prompt: str = "x", **more: Any) -> tuple[Reading, Structure | None]:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": "required"}
        request: ChatRequest = parse_chat(body | more)
        return reading_of(request, self.format, self.tokenizer, self.tokenizer.encode(prompt))

    def read(self, reading: Reading, tokens: list[int], finish: FinishReason) -> Found:
        transcript = Transcript(self.tokenizer.pieces, Prompt([5], reading=reading), (), 0)
        last = len(tokens) - 1
        return read(
            reading,
            [transcript.push(Token("r", one, finish if n == last else None, 0.0)) for n, one in enumerate(tokens)],
        )

    def walk(self, structure: Structure | None, seed: int, begin: str = "") -> list[int]:
        """An answer that goes on behind `begin` with tokens that are chosen by chance, ends and markers more often."""
        chance, output = random.Random(seed), self.tokenizer.encode(begin, add_special_tokens=False)
        assert structure is not None
        held = matching(self.compiler, structure.grammar)
        rare = {id for id, text in self.tokenizer.pieces.added.items() if text in MARKUP} | {self.end}
        while not output or output[-1] != self.end:
            can = allowed(self.compiler, held, output)
            output.append(chance.choice(sorted(can & rare if can & rare and chance.random() < 0.3 else can)))
            assert len(output) < 2000
        return output


@cache
def model(name: str, added: bool = False) -> Model:
    return Model(name, added)


def check(found: Found, names: set[str]) -> None:
    assert found.calls and not found.content
    for name, arguments, ended in found.calls:
        assert ended and name in names
        given = json.loads(arguments)
        if name == "look":
            jsonschema.validate(given, SCHEMA)
        else:
            assert given == {}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_chosen_is_calls(name: str, added: bool) -> None:
    one = model(name, added)
    several = 0
    for seed in range(4):
        reading, structure = one.asked("</think>")
        found = one.read(reading, one.walk(structure, seed), FinishReason.STOP)
        check(found, {"look", "look_up"})
        several += len(found.calls) > 1
        reading, structure = one.asked("</think>", parallel_tool_calls=False)
        assert len(one.read(reading, one.walk(structure, seed), FinishReason.STOP).calls) == 1
    assert several or FORMATS[name] == "llama3_json"


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_called_once(name: str) -> None:
    choice = {"type": "function", "function": {"name": "look_up"}}
    reading, structure = model(name).asked("</think>", tool_choice=choice)
    for seed in range(2):
        found = model(name).read(reading, model(name).walk(structure, seed), FinishReason.STOP)
        check(found, {"look_up"})
        assert len(found.calls) == 1


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("mistral_array", "qwen3_vl")])
def test_what_a_template_writes_may_be_chosen(name: str, added: bool) -> None:
    """(Those two write a space, and a line, that models of theirs leave out.)"""
    one = model(name, added)
    _, structure = one.asked()
    assert structure is not None
    call = ("look", {"a": "</tool_call>", "b": True})
    text = written(name, call) if FORMATS[name] == "llama3_json" else written(name, call, ("look_up", {}), call)
    text = re.sub(r"(<\|im_end\|>|<\|eot_id\|>|<eos>)\s*$", "", text)
    arguments = json.dumps(call[1])
    tokens = list[int]()
    for part in re.split(f"({re.escape(arguments)})", text):  # what stands in arguments is spelt in letters
        for one_more in part if part == arguments else [part]:
            tokens += one.tokenizer.encode(one_more, add_special_tokens=False)
    held = matching(one.compiler, structure.grammar)
    for n, token in enumerate(tokens):
        assert token in allowed(one.compiler, held, tokens[:n]), one.tokenizer.decode(tokens[: n + 1])
    assert one.end in allowed(one.compiler, held, tokens)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("prompt", "begin", "thought"),
    [
        ("x", "<think>\nhm </t\n</think>\n\n", "hm </t"),
        ("<think>\n", "hm </t\n</think>\n\n", "hm </t"),
        ("<think>\n", "</think>", ""),
        ("<think>\n\n</think>\n\n", "", ""),
    ],
)
def test_a_model_that_thinks_may_think_before(added: bool, prompt: str, begin: str, thought: str) -> None:
    one = model("qwen3", added)
    for seed in range(2):
        reading, structure = one.asked(prompt)
        found = one.read(reading, one.walk(structure, seed, begin), FinishReason.STOP)
        check(found, {"look", "look_up"})
        assert found.thought == thought


def test_a_model_that_was_told_not_to_think_does_not() -> None:
    one = model("qwen3", True)
    reading, structure = one.asked("<think>\n\n</think>\n\n")
    assert not one.read(reading, one.walk(structure, 0), FinishReason.STOP).thought
    (tag,) = one.tokenizer.encode("<think>", add_special_tokens=False)
    for prompt, may in (("x", True), ("<think>\n\n</think>\n\n", False)):
        _, structure = one.asked(prompt)
        assert structure is not None
        assert (tag in allowed(one.compiler, matching(one.compiler, structure.grammar))) == may


def test_a_call_that_is_cut_has_not_ended() -> None:
    one = model("qwen2_5", True)
    reading, structure = one.asked()
    tokens = one.walk(structure, 1)
    for length in range(1, len(tokens) - 1):
        found = one.read(reading, tokens[:length], FinishReason.LENGTH)
        for name, arguments, ended in found.calls:
            assert name in ("look", "look_up") and (ended or not arguments or arguments[0] == "{")
