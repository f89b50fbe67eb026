"""What a chat template gets as the content of a message, by the way the template is written.

The expected form of a template that handles one form only is vLLM's ("openai" for a loop over the content, "string"
otherwise; its issues 53820 and 49042 are the macros, which its search of the syntax tree once missed).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve_agent.chat.template import ChatTemplateError
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.rendering import Conversation, Renderer

ROLES = frozenset(("system", "user", "assistant"))
PART = "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
ALL = "{% for m in messages %}<|user|>BODY{% endfor %}"
Make = Callable[[Any], Tokenizer]


@pytest.fixture
def with_template(tmp_path: Path, model_folder: Path) -> Make:
    def make(template: Any) -> Tokenizer:
        config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
        return Tokenizer(tmp_path)

    return make


def body(text: str) -> str:
    return ALL.replace("BODY", text)


LOOPS = {
    "loop": body("{% for part in m.content %}" + PART + "{% endfor %}"),
    "item": body("{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"),
    "variable": body("{% set c = m.content %}{% for part in c %}{{ part.text }}{% endfor %}"),
    "filter": body("{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"),
    "map": body("{{ m.content | map(attribute='text') | join }}"),
    "index": body("{% for n in range(m.content | length) %}{{ m.content[n].text }}{% endfor %}"),
    "either": body("{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}"
    "{% endfor %}{% endif %}"),
    "macro": "{% macro show(said) %}{% for part in said %}{{ part.text }}{% endfor %}{% endmacro %}"
    + body("{{ show(m.content) }}"),
    "upper": body("{% for part in m.content %}{{ part.text | upper }}{% endfor %}"),
    "needs-system": "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    + body("{% for part in m.content %}{{ part.text }}{% endfor %}"),
}  # fmt: skip
STRINGS = {
    "plain": body("{{ m.content }}"),
    "concatenated": "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}",
    "trimmed": body("{{ m.content | trim }}"),
    "json": body("{{ m.content | tojson }}"),
    "split": body("{{ m.content.split('</think>')[-1] }}"),
    "characters": body("{% for c in m.content %}{{ c }}{% endfor %}"),
    "first-part": body("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"),
    "no-roles": "{{ raise_exception('never') }}",
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_template_that_loops_gets_parts(with_template: Make, name: str) -> None:
    tokenizer = with_template(LOOPS[name])
    assert tokenizer._in_parts >= ({"system", "user"} if name == "needs-system" else ROLES)
    system = [{"role": "system", "content": "s"}] if name == "needs-system" else []
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    text, joined = (
        tokenizer.decode(tokenizer.encode_chat([*system, {"role": "user", "content": content}]), False).lower()
        for content in ("one two", parts)
    )
    assert text == joined == ("<|user|>s" if system else "") + "<|user|>one two"


@pytest.mark.parametrize("name", STRINGS)
def test_any_other_gets_a_string(with_template: Make, name: str) -> None:
    tokenizer = with_template(STRINGS[name])
    assert tokenizer._in_parts == frozenset()
    if name in ("no-roles", "broken"):
        return
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined, text = (tokenizer.encode_chat([{"role": "user", "content": content}]) for content in (parts, "one\ntwo"))
    assert joined == text  # "\n" is vLLM's
    if name != "json":
        assert tokenizer.decode(text, False) == "<|user|>one\ntwo"


def test_roles_of_one_template_are_told_apart(with_template: Make) -> None:
    """Llama 3.2 Vision's way: it trims the system message, and loops over the others."""
    tokenizer = with_template(
        "{% if messages[0].role == 'system' %}[{{ messages[0].content | trim }}]{% set messages = messages[1:] %}"
        "{% endif %}" + LOOPS["loop"]
    )
    assert tokenizer._in_parts == {"user", "assistant"}
    chat = [{"role": "system", "content": [{"type": "text", "text": "be"}]}, {"role": "user", "content": "hi"}]
    assert tokenizer.decode(tokenizer.encode_chat(chat), False) == "[be]<|user|>hi"


def test_results_of_tools_stay_strings(with_template: Make) -> None:
    tool = "{% if m.role == 'tool' %}({{ m.content }})"
    tokenizer = with_template(
        body(tool + "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}")
    )
    for content in ("42", [{"type": "text", "text": "42"}]):
        chat = [{"role": "user", "content": "x"}, {"role": "tool", "content": content}]
        assert tokenizer.decode(tokenizer.encode_chat(chat), False) == "<|user|>x<|user|>(42)"


def test_training_writes_what_serving_does(with_template: Make) -> None:
    tokenizer = with_template(LOOPS["loop"])
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (rendered,) = Renderer(tokenizer, (3,)).chat(Conversation(turns))
    prompt = tokenizer.encode_chat(turns[:1])
    assert rendered.tokens[: len(prompt)] == prompt and not any(rendered.learned[: len(prompt)])
    assert tokenizer.decode(rendered.tokens[len(prompt) :], False) == "two<|end|>"


def test_of_several_templates_the_default_is_taken(with_template: Make) -> None:
    named = [{"name": "default", "template": LOOPS["loop"]}, {"name": "tool_use", "template": "{{ 1 }}"}]
    tokenizer = with_template(named)
    assert tokenizer._in_parts == ROLES
    tokens = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(tokens, False) == "<|user|>hi"
    with pytest.raises(ChatTemplateError, match="no chat template"):
        with_template([{"name": "rag", "template": "{{ 1 }}"}]).encode_chat([{"role": "user", "content": "hi"}])


FAILURES = {
    "raised": ("{{ raise_exception('only one turn') }}", "^only one turn$"),
    "undefined": ("{{ messages[7].content.text }}", "undefined|no element"),
    "type": ("{{ messages[0].content + 1 }}", "TypeError"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "overflow": ("{{ 2.0 ** 5000 }}", "OverflowError"),
    "attribute": ("{{ messages.nothing() }}", "undefined|no attribute"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "filter": ("{{ messages | nothing }}", "nothing"),
    "syntax": ("{% if %}", "Expected an expression"),
    "time": ("{{ strftime_now(3) }}", "TypeError"),
    "surrogate": ("{{ '\\ud83d' }}", "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_a_template_raises_is_the_messages_fault(with_template: Make, name: str) -> None:
    template, words = FAILURES[name]
    tokenizer = with_template(template)
    with pytest.raises(ChatTemplateError, match=words):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
