"""Templates and folders as some models have them, each of which once taught something else than was said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import all_templates, write_folder

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.variables import TemplateVariableError, try_variables
from coserve_agent.data.rendering import Conversation, Rendered, Renderer, RenderingError
from coserve_agent.generation.chat import VARIABLES, blaming_variables
from coserve_agent.http.errors import ApiError

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}
AGAIN, NO = {"role": "user", "content": "so"}, {"role": "assistant", "content": "ko"}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": "me"}}}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# SmolLM3's variables for tools: the template reads no `tools`.
XML_TOOLS = "{% if xml_tools %}{% for t in xml_tools %}{{ t | tojson }}{% endfor %}{% endif %}" + CHATML
# DeepSeek-V3.1's: a block of thoughts is taken out, and the block that a prompt opens stands closed in the history.
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
    "{% else %}{{ '</think>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# Kimi K2.5's: always a block, filled by reasoning_content alone.
FIELD = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
    "{% else %}{{ '<think>' + m.get('reasoning_content', '') + '</think>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
BETWEEN = CHATML.replace("+ '<|im_end|>\\n'", "+ ('<|im_end|>\\n' if not loop.last or add_generation_prompt else '')")


class Model:
    def __init__(self, folder: Path, template: str) -> None:
        if not folder.exists():
            write_folder(folder, template, "bytes")
        self.tokenizer = Tokenizer(folder)
        self.ends = end_tokens(folder, self.tokenizer)

    def learned(self, *messages: dict[str, Any], **options: Any) -> list[str]:
        """Of each sequence what is learned."""
        conversation = Conversation(messages, options.pop("tools", ()))
        sequences = Renderer(self.tokenizer, self.ends, **options).chat(conversation)
        return ["".join(self._parts(one)).lstrip("|") for one in sequences]

    def _parts(self, one: Rendered) -> Iterator[str]:
        """What is learned of a sequence, a | for each other token."""
        for token, learned in zip(one.tokens, one.learned, strict=True):
            yield self.tokenizer.pieces.bytes_of(token).decode() if learned else "|"


def test_tools_under_another_name_are_not_written(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", XML_TOOLS)
    assert "tools" not in model.tokenizer.written_fields
    assert "tools" in Model(tmp_path / "n", all_templates()["qwen2_5"]).tokenizer.written_fields
    with pytest.raises(RenderingError, match=r"does not write tools"):
        model.learned(USER, YES, tools=[TOOL])
    assert model.learned(USER, YES, variables={"xml_tools": [TOOL]}) == ["ok<|im_end|>"]


def test_thoughts_may_be_called_thinking(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", all_templates()["gptoss"])
    assert "reasoning_content" in model.tokenizer.written_fields
    (text,) = model.learned(USER, {**YES, "reasoning_content": "hm"})
    assert text.startswith("<|channel|>analysis<|message|>hm<|end|>") and text.endswith("<|message|>ok<|return|>")
    # A variable of that name is no field.
    assert "reasoning_content" not in Model(tmp_path / "n", "{{ thinking }}" + CHATML).tokenizer.written_fields


def test_a_block_of_thoughts_is_not_lost(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", THINKING)
    thought = {**YES, "content": "<think>hm</think>ok"}
    with pytest.raises(RenderingError, match="think block in content"):
        model.learned(USER, thought)
    assert model.learned(USER, {**YES, "content": "<think>\n</think>ok"}) == ["ok<|end|>"], "there is none"
    assert model.learned(USER, thought, variables={"thinking": True}) == ["hm</think>ok<|end|>"]
    assert model.learned(USER, YES, variables={"thinking": True}) == ["</think>ok<|end|>"]
    llama = Model(tmp_path / "n", all_templates()["llama3_1"])
    with pytest.raises(RenderingError, match="think block in content"):
        llama.learned(USER, {**YES, "content": "<think>hm</think>", "tool_calls": [CALL]}, tools=[TOOL])


def test_a_content_with_thoughts_fills_the_open_block(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", FIELD)
    assert model.learned(USER, {**YES, "content": "<think>hm</think>ok"}) == ["hm</think>ok<|end|>"]
    assert model.learned(USER, {**YES, "reasoning_content": "hm"}) == ["hm</think>ok<|end|>"]
    assert model.learned(USER, YES) == ["</think>ok<|end|>"]


@pytest.mark.parametrize(("template", "said"), [(TRIMMING, " \n"), (THINKING, "<think>\n</think>")])
def test_an_end_alone_is_not_learned(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(RenderingError, match=r"messages\[1\].*its end alone"):
        Model(tmp_path / "m", template).learned(USER, {**YES, "content": said})


def test_an_end_that_the_folder_names_but_does_not_call_special(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_folder(folder, CHATML, "bytes")
    files = {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    (end,) = (one for one in files["tokenizer.json"]["added_tokens"] if one["content"] == "<|im_end|>")
    end["special"] = False
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        files["tokenizer_config.json"].pop(name, None)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end["id"]]}))
    model = Model(folder, CHATML)
    assert end["id"] not in model.tokenizer.pieces.special and end["id"] in model.ends
    assert Renderer(model.tokenizer, model.ends).notes == ()
    (both,) = model.learned(USER, YES, AGAIN, NO)
    assert both.startswith("ok<|im_end|>|") and both.endswith("|ko<|im_end|>")


def test_a_content_that_ends_like_a_turn_still_gets_an_end(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", BETWEEN)
    assert model.learned(USER, {**YES, "content": "ok<|im_end|>"}) == ["ok<|im_end|><eos>"]
    assert model.learned(USER, {**YES, "content": "ok<eos>"}) == ["ok<eos>"]


def test_a_value_that_the_template_cannot_take_is_the_variables_fault(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", all_templates()["llama3_2"])
    with pytest.raises(TemplateVariableError, match=r"templateVariables has values .*TypeError.*correct date_string"):
        model.learned(USER, YES, variables={"date_string": 5})
    try_variables(model.tokenizer, {"date_string": "5 May"}, "it", [USER])
    many = [{"role": f"r{n}", "content": "x"} for n in range(20)]
    try_variables(model.tokenizer, {"date_string": 5}, "the messages are at fault, too", many)
    wanted = pytest.raises(ApiError, match=r"chat_template_kwargs has values .*correct date_string")
    with wanted as caught, blaming_variables():
        try_variables(model.tokenizer, {"date_string": None}, VARIABLES, [USER])
    assert caught.value.status == 400
