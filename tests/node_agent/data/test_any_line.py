"""Whatever a line holds, it gives samples or is refused: nothing else is ever raised, and nothing else ever learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_rows import GOOD, reader_of, samples_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data import reader as reader_module
from coserve_agent.data.problems import LineError, Reason
from coserve_agent.data.rendering import Renderer
from coserve_api.job import DatasetFormat, Learn

ANY = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.sampled_from(["", "one", "two\n", " ", "x \ud83d", "\0", "<|end|>", "{", "é😀", "5"]) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS | VALUES, "arguments": TEXTS | VALUES})},
        optional={"id": TEXTS | VALUES, "type": TEXTS},
    )
    | VALUES,
    max_size=2,
)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "function", "human", "gpt"]) | VALUES
CONTENTS = TEXTS | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS | VALUES}) | VALUES, max_size=2
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLES,
            "content": CONTENTS | VALUES,
            "from": ROLES,
            "value": CONTENTS | VALUES,
            "weight": st.sampled_from([0, 1, 0.0, 0.5, None, True]) | VALUES,
            "train": st.booleans() | VALUES,
            "tool_calls": CALLS | VALUES,
            "reasoning_content": TEXTS | VALUES,
            "name": TEXTS | VALUES,
            "tool_call_id": TEXTS | VALUES,
            "other": VALUES,
        },
    )
    | VALUES,
    max_size=4,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | VALUES,
        "conversations": MESSAGES | VALUES,
        "prompt": TEXTS | MESSAGES | VALUES,
        "completion": TEXTS | MESSAGES | VALUES,
        "instruction": TEXTS | VALUES,
        "input": TEXTS | VALUES,
        "output": TEXTS | VALUES,
        "system": TEXTS | VALUES,
        "history": st.lists(st.lists(TEXTS, max_size=3) | VALUES, max_size=2) | VALUES,
        "tools": CALLS | TEXTS | VALUES,
        "text": TEXTS | VALUES,
        "label": st.booleans() | VALUES,
    },
)
LINES = st.binary(max_size=40) | (VALUES | ROWS).map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass"))


def gives_samples_or_is_refused(tokenizer: Tokenizer, raw: bytes, format: DatasetFormat, learn: Learn) -> None:
    try:
        reading = reader_of(tokenizer, format=format, learn=learn).detected(raw).read(7, raw)
    except LineError as error:
        assert error.reason is not Reason.UNREADABLE, f"no word of its own for {error}"
        return
    assert reading.samples
    for sample in reading.samples:
        assert (sample.id, len(sample.weights)) == (7, len(sample.tokens))
        assert any(sample.weights[1:])
        assert all(0 <= token < tokenizer.size for token in sample.tokens)


@ANY
@given(LINES, st.sampled_from(DatasetFormat), st.sampled_from(Learn))
def test_any_line(rich: Tokenizer, raw: bytes, format: DatasetFormat, learn: Learn) -> None:
    gives_samples_or_is_refused(rich, raw, format, learn)


@ANY
@given(LINES)
def test_any_line_with_a_marked_template(tokenizer: Tokenizer, raw: bytes) -> None:
    gives_samples_or_is_refused(tokenizer, raw, DatasetFormat.AUTO, Learn.ALL)


class Panic(BaseException):
    """As a panic inside the tokenizer arrives."""


@pytest.mark.parametrize("raised", [ZeroDivisionError("x"), MemoryError(), RecursionError("deep"), Panic("x \ud83d")])
def test_what_nobody_thought_of_is_the_lines_error(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def broken(self: Renderer, conversation: Any) -> Any:
        raise raised

    monkeypatch.setattr(Renderer, "chat", broken)
    with pytest.raises(LineError, match=f"cannot be read \\({type(raised).__name__}") as caught:
        samples_of(tokenizer, GOOD)
    assert caught.value.reason is Reason.UNREADABLE


def test_an_interrupt_is_nobodys_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(raw: bytes) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reader_module, "parse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        samples_of(tokenizer, GOOD)


def test_an_id_beyond_the_models_vocabulary_is_the_lines_error(tokenizer: Tokenizer) -> None:
    (good,) = samples_of(tokenizer, GOOD)
    last = max(good.tokens)
    assert samples_of(tokenizer, GOOD, vocab_size=last + 1) == (good,)
    with pytest.raises(LineError, match=rf"has token {last}, .* no row for \(vocab_size is {last}\)") as caught:
        samples_of(tokenizer, GOOD, vocab_size=last)
    assert caught.value.reason is Reason.VOCABULARY


# ---- what leaves the pod ----

SECRET = "zq7secret"


def marked(value: Any) -> Any:
    """`value` with a secret in each of its strings, but where a role or a type decides what becomes of it."""
    if isinstance(value, str):
        return value if value in ("user", "assistant", "text", "function_call") else f"{value} {SECRET} {value}"
    if isinstance(value, list):
        return [marked(one) for one in value]
    if isinstance(value, dict):
        return {name if name in NAMES else f"{SECRET} {name}": marked(one) for name, one in value.items()}
    return 70_731_234 if isinstance(value, int | float) and not isinstance(value, bool) else value


NAMES = frozenset(
    ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "history",
     "tools", "text", "label", "role", "content", "from", "value", "weight", "train", "tool_calls", "function", "name",
     "arguments", "id", "type", "reasoning_content", "tool_call_id")
)  # fmt: skip


@ANY
@given((VALUES | ROWS).map(marked), st.sampled_from(DatasetFormat), st.booleans())
def test_what_is_said_in_public_holds_nothing_of_the_line(
    rich: Tokenizer, row: Any, format: DatasetFormat, cut: bool
) -> None:
    """Negative control: what is said here, where the line lies, does."""
    raw = json.dumps(row).encode("utf-8", "surrogatepass")
    try:
        reading = reader_of(rich, format=format).detected(raw).read(7, raw[:-1] if cut else raw)
    except LineError as error:
        assert SECRET not in error.public
        assert "70731234" not in error.public
        return
    assert not any(SECRET in error.public for error in reading.refused)


@pytest.mark.parametrize(
    ("row", "here", "public"),
    [
        ({"text": 70_731_234}, "text is 70731234; it must be a string", "text is a number; it must be a string"),
        (
            {"conversations": [{"from": SECRET, "value": "x"}]},
            f"conversations[0].from is '{SECRET}'",
            "conversations[0].from is a string; it must be one of human",
        ),
        (
            {"messages": [{"role": "user", "content": "a", SECRET + " x": 5}]},
            f"messages[0].{SECRET} x is 5: it is no field",
            "messages[0].… is no field that is known here; remove it",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": SECRET}]}, {"role": "assistant", "content": "b"}]},
            f"type '{SECRET}'",
            "a content part of another type than 'text'",
        ),
        (b'{"text": zq7secret}', "is not JSON (Expecting value", "is not JSON (Expecting value at character 10)"),
        ({SECRET + " x": 1}, f"has {SECRET} x; it must", "has no such field; it must have messages"),
    ],
)
def test_a_refusal_quotes_the_line_where_it_lies_and_names_the_field_in_public(
    rich: Tokenizer, row: Any, here: str, public: str
) -> None:
    with pytest.raises(LineError) as caught:
        samples_of(rich, row)
    assert here in str(caught.value)
    assert public in caught.value.public
    assert SECRET not in caught.value.public


def test_a_templates_own_words_are_not_said_in_public(rich: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise TemplateError(f"unexpected {SECRET}")

    monkeypatch.setattr("coserve_agent.chat.template._Environment.bounded", refuse)
    with pytest.raises(LineError, match=SECRET) as caught:
        samples_of(rich, GOOD)
    assert caught.value.public.startswith("messages[1]: the chat template does not accept these messages; change")
