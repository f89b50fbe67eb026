"""The environment of chat templates: transformers' in what it renders, bounded in what it does, and its variables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from chat_templates import trl_templates
from transformers.utils.chat_template_utils import render_jinja_template

from coserve_agent.chat import template as chat_template
from coserve_agent.chat.template import ChatTemplate, ChatTemplateError, Given

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = trl_templates()
CALLED = {"name": "look", "arguments": {"at": "é", "n": [1, None]}}
CALL = {"type": "function", "id": "abcdefghi", "function": CALLED}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " hi\n"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "<a & b>"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    ],
]  # fmt: skip


def reference(template: str, chat: Sequence[dict[str, Any]], tools: Any, ask: bool) -> str | None:
    try:
        (text,), _ = render_jinja_template(
            [list(chat)], tools=tools, chat_template=template, add_generation_prompt=ask, **TOKENS
        )
    except Exception:
        return None
    return str(text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_what_transformers_does(name: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], TOKENS)
    accepted = 0
    for chat in CHATS:
        for tools in ([], [TOOL]):
            for ask in (True, False):
                expected = reference(TEMPLATES[name], chat, tools or None, ask)
                if expected is None:
                    with pytest.raises(ChatTemplateError):
                        ours.render(chat, Given(tools), add_generation_prompt=ask)
                    continue
                accepted += 1
                assert ours.render(chat, Given(tools), add_generation_prompt=ask) == expected
    assert accepted or name.startswith("llava")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "takes more than"),
        (
            "{% for a in range(99999) %}{% for b in range(999) %}{{ 'long' * 9999 }}{% endfor %}{% endfor %}",
            "characters",
        ),
        ("{{ 'long' * 99999999 }}", "characters"),
        ("{{ 99999999 * 'long' }}", "characters"),
        ("{{ 9 ** 99999 }}", "too large"),
        ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "Recursion|takes more than"),
    ],
)
def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, body: str, words: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "MAX_CHARS", 1 << 20)
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(body, TOKENS).render(CHATS[0], add_generation_prompt=True)


def test_loops_know_their_length_and_their_end() -> None:
    body = "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{% else %}none{% endfor %}"
    template = ChatTemplate(body, TOKENS)
    assert template.render(CHATS[1], add_generation_prompt=False) == "3False33False23True1"
    assert template.render([], add_generation_prompt=False) == "none"
    assert ChatTemplate("{% for t in nothing %}x{% endfor %}", TOKENS).render([], add_generation_prompt=False) == ""
    marked = ChatTemplate("{% generation %}{% for c in 'ab' %}{{ c }}{% endfor %}{% endgeneration %}", TOKENS)
    assert marked.render([], add_generation_prompt=False) == "ab"


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen2_5", set()),
        ("llama3", set()),
        ("llama3_2", {"custom_tools", "date_string", "tools_in_user_message"}),
        ("nemotron_3_nano", {"enable_thinking", "truncate_history_thinking"}),
    ],
)
def test_variables_are_what_the_template_reads(name: str, variables: set[str]) -> None:
    assert ChatTemplate(TEMPLATES[name], TOKENS).variables == variables


def test_no_argument_or_function_is_a_variable() -> None:
    body = (
        "{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}{{ strftime_now('%Y') }}"
        "{{ raise_exception }}{{ namespace() }}{{ range(1) }}{{ dict() }}{{ mine }}{% set own = 1 %}{{ own }}"
    )
    assert ChatTemplate(body, TOKENS).variables == {"mine"}


def test_the_date_is_an_argument() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", TOKENS)
    assert template.asks_for_the_date
    assert template.render([], Given(today=date(2026, 7, 26)), add_generation_prompt=False) == "26 Jul 2026"
    assert not ChatTemplate("{{ bos_token }}", TOKENS).asks_for_the_date
    llama = ChatTemplate(TEMPLATES["llama3_2"], TOKENS)
    dated = llama.render(CHATS[0], Given(today=date(2026, 7, 26)), add_generation_prompt=True)
    assert "Today Date: 26 Jul 2026" in dated
    given = llama.render(CHATS[0], Given(variables={"date_string": "1 May 1999"}), add_generation_prompt=True)
    assert "Today Date: 1 May 1999" in given
