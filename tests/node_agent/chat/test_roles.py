"""A message whose role a chat template skips is never lost in silence, in a row of data or in a request.

Templates below take roles in the ways that published ones do: Llama 3 and ChatML write any, Llama 2 reads the first
message alone as the system's, Gemma raises, DeepSeek-R1 and Phi-3 skip what they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve_agent.chat.roles import Roles
from coserve_agent.chat.template import ChatTemplateError
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.rendering import Conversation, Renderer, RenderingError

USER, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
EACH = "{% for m in messages %}BODY{% endfor %}"
CHATML = EACH.replace("BODY", "<|{{ m.role }}|>{{ m.content | trim }}<|end|>")
SKIPPING = EACH.replace(
    "BODY",
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% endif %}",
)
WITH_SYSTEM = SKIPPING.replace("{% if m.role == 'user' %}", "{% if m.role == 'system' %}({{ m.content }})"
    "{% elif m.role == 'user' %}")  # fmt: skip
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}({{ messages[0].content }}){% endif %}" + SKIPPING
"""Only the first message is the system's; a later one is skipped."""
RAISING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}{% endfor %}"
)
MISTRAL_TOOLS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of 9 characters') }}{% endif %}"
    "[RESULT]{{ m.name }}{{ m.content }}{% elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function.name }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% else %}{{ raise_exception('Only user, assistant and tool') }}"
    "{% endif %}{% endfor %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + WITH_SYSTEM
Make = Callable[[str], Tokenizer]


@pytest.fixture
def with_template(tmp_path: Path, model_folder: Path) -> Make:
    def make(template: str) -> Tokenizer:
        config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
        return Tokenizer(tmp_path)

    return make


def text(tokenizer: Tokenizer, *roles: str) -> str:
    """A conversation whose messages hold their own roles; for a tool with the fields that templates ask of it."""
    messages: list[dict[str, Any]] = [
        {"role": role, "content": f"<{role}>", "tool_call_id": "abcdefghi", "name": "fox"} for role in roles
    ]
    return tokenizer.decode(tokenizer.encode_chat(messages), False)


@pytest.mark.parametrize(
    ("template", "roles", "written"),
    [
        (CHATML, ("critic", "user"), "<critic>"),
        (CHATML, ("developer", "user"), "<|developer|><developer>"),
        (SKIPPING, ("user", "assistant", "user"), "<assistant>"),
        (WITH_SYSTEM, ("user", "system", "user"), "(<system>)"),
        (WITH_SYSTEM, ("developer", "user"), "(<developer>)"),
        (WITH_SYSTEM, ("user", "developer", "user"), "(<developer>)"),
        (FIRST_SYSTEM, ("system", "user"), "(<system>)"),
        (FIRST_SYSTEM, ("developer", "user"), "(<developer>)"),
        (NEEDS_SYSTEM, ("system", "user", "assistant"), "<assistant>"),
        (NEEDS_SYSTEM, ("developer", "user"), "(<developer>)"),
        (MISTRAL_TOOLS, ("user", "assistant", "tool"), "[RESULT]fox<tool>"),
        (RAISING, ("user", "assistant", "user"), "[user] <user>"),
    ],
)
def test_what_the_template_writes_is_written(
    with_template: Make, template: str, roles: tuple[str, ...], written: str
) -> None:
    assert written in text(with_template(template), *roles)


@pytest.mark.parametrize(
    ("template", "roles", "words"),
    [
        (SKIPPING, ("system", "user"), "message 0 has role 'system'"),
        (SKIPPING, ("developer", "user"), "message 0 has role 'developer'"),
        (SKIPPING, ("user", "tool"), "message 1 has role 'tool'"),
        (SKIPPING, ("user", "critic", "assistant"), "message 1 has role 'critic'"),
        (SKIPPING, ("human", "user"), "message 0 has role 'human'"),
        (WITH_SYSTEM, ("system", "user", "function"), "message 2 has role 'function'"),
        (FIRST_SYSTEM, ("user", "assistant", "system", "user"), "message 2 has role 'system', .* write there"),
        (FIRST_SYSTEM, ("user", "developer", "user"), "message 1 has role 'developer', .* write there"),
        (NEEDS_SYSTEM, ("system", "tool", "user"), "message 1 has role 'tool'"),
    ],
)
def test_what_it_skips_is_refused_by_name(
    with_template: Make, template: str, roles: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        text(with_template(template), *roles)


@pytest.mark.parametrize(
    ("template", "roles", "words"),
    [
        (RAISING, ("system", "user"), "^System role not supported$"),
        (RAISING, ("developer", "user"), "^System role not supported$"),
        (RAISING, ("user", "user"), "^roles must alternate$"),
        (MISTRAL_TOOLS, ("critic", "user"), "^Only user, assistant and tool$"),
        (NEEDS_SYSTEM, ("user",), "^system first$"),
    ],
)
def test_what_it_refuses_it_says_itself(with_template: Make, template: str, roles: tuple[str, ...], words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        text(with_template(template), *roles)


def test_training_and_serving_decide_alike(with_template: Make) -> None:
    tokenizer = with_template(WITH_SYSTEM)
    chat = [{"role": "developer", "content": "be"}, USER, ANSWER]
    (one,) = Renderer(tokenizer, (3,)).chat(Conversation(chat))
    prompt = tokenizer.encode_chat(chat[:2])
    assert one.tokens[: len(prompt)] == prompt
    unknown = [USER, {"role": "critic", "content": "x"}, ANSWER]
    with pytest.raises(ChatTemplateError, match="message 1 has role 'critic'"):
        tokenizer.encode_chat(unknown)
    with pytest.raises(RenderingError, match="message 1 has role 'critic'"):
        Renderer(tokenizer, (3,)).chat(Conversation(unknown))


def test_each_role_is_tried_once() -> None:
    calls = []

    def render(messages: Any) -> str:
        calls.append(messages)
        return " ".join(str(message["content"]) for message in messages)

    roles = Roles(render)
    chat = [USER, ANSWER] * 50
    assert roles.as_written(chat) == chat
    tried = len(calls)
    assert tried <= 3, "the first message, a later user's, an assistant's"
    roles.as_written(chat)
    assert len(calls) == tried
    with pytest.raises(ChatTemplateError, match="17 different roles; at most 16 are allowed"):
        roles.as_written([{"role": f"role{n}", "content": "x"} for n in range(17)])
    assert len(calls) == tried, "not one of them is tried"
    for n in range(200):
        roles.as_written([USER, {"role": f"role{n}", "content": "x"}])
    assert roles._written.cache_info().currsize <= 64, "names are the client's: what is remembered is bounded"


# ---- names ----

NAMED = EACH.replace("BODY", "<|{{ m.role }}|>{{ m.name or m.role }}:{{ m.content }}<|end|>")
"""As Kimi K2's: a name stands in the place of the role's."""


@pytest.mark.parametrize(
    ("template", "named", "nameless"),
    [
        (CHATML, (), ("user", "assistant", "system", "tool", "developer", "critic")),
        (NAMED, ("user", "assistant", "system", "tool", "developer", "critic"), ()),
        (MISTRAL_TOOLS, ("tool",), ("user", "assistant", "system")),
        (WITH_SYSTEM, (), ("user", "developer")),
        (WITH_SYSTEM.replace("({{", "({{ m.name }}{{"), ("system", "developer"), ("user", "assistant")),
        (RAISING.replace("[{{ m.role }}]", "{{ m.name }}"), ("user", "assistant", "tool"), ()),
    ],
    ids=["chatml", "named", "mistral", "system", "system-named", "raising"],
)
def test_whose_names_are_written(
    with_template: Make, template: str, named: tuple[str, ...], nameless: tuple[str, ...]
) -> None:
    tokenizer = with_template(template)
    for role in (*named, *nameless):
        message = {"role": role, "content": "x", "name": "fox"}
        assert tokenizer.loses_name(message) == (role in nameless), role
        assert not tokenizer.loses_name({"role": role, "content": "x"})


def test_a_name_that_the_template_writes_is_context_and_no_answer(with_template: Make) -> None:
    """Nobody can ask for an answer of a name: behind the prompt stands the content alone."""
    tokenizer = with_template(NAMED + "{% if add_generation_prompt %}<|assistant|>assistant:{% endif %}")
    renderer = Renderer(tokenizer, (3,))
    user, answer = {**USER, "name": "dog"}, {**ANSWER, "name": "fox"}
    first, second = renderer.chat(Conversation([user, answer, user, answer]))
    asked = [tokenizer.encode_chat(messages) for messages in ([user], [user, answer, user])]
    for sequence, prompt, text in zip((first, second), asked, ("<|user|>dog:one", "<|assistant|>fox:two"), strict=True):
        assert sequence.tokens[: len(prompt)] == prompt
        assert text in tokenizer.decode(prompt, False)
        assert tokenizer.decode(sequence.tokens[len(prompt) :], False) == "two<|end|>"
        assert sequence.learned == [False] * len(prompt) + [True] * (len(sequence.tokens) - len(prompt))
