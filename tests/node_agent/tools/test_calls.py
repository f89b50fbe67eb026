"""Calls in what models say: right values, form by form, however the text is cut, and content where there is no call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from answers_read import Found, cuts, read, read_all_ways
from call_templates import FORMATS, ids, tokenizer, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve_agent.generation.transcript import Transcript
from coserve_agent.requests.prompts import Prompt
from coserve_agent.text.marks import NO_MARKS
from coserve_agent.tools.answer_format import answer_format
from coserve_agent.tools.formats import format_of
from coserve_agent.tools.reading import AnswerParser, Reading
from coserve_api.endpoint import ToolCallParser
from coserve_engine.messages import FinishReason, Token

ANY = tokenizer("qwen2_5")
NAMES = frozenset(("look", "f", "get_weather"))


def reading(form: str, **more: Any) -> Reading:
    return Reading(format=format_of(ToolCallParser(form), NO_MARKS, ANY.pieces), names=NAMES, **more)


HERMES, LLAMA, MISTRAL = map(reading, ("hermes", "llama3_json", "mistral"))

# ---- what templates write, as their models say it ----

HARD: list[dict[str, Any]] = [
    {},
    {"at": "me"},
    {"s": 'a "quoted" \\ back\\slash / \t\n}{][ ' + "</tool_call> [TOOL_CALLS] <|python_tag|> é 你好 😀"},
    {"n": [1, -2.5e10, None, True, {"deep": {"er": [[], {}]}}], "": "", "é": "你好 😀 }</tool_call>{"},
]
SPELT = 2
"""Which of them holds special tokens, spelt in letters; that takes a tokenizer of bytes."""


def said(name: str, text: str, *, kind: str = "bytes", spelt: str = "") -> tuple[Found, list[str]]:
    """What is read of an answer with this text, token by token, and its pieces of text."""
    of, found = tokenizer(name, kind), answer_format(tokenizer(name, kind))
    how = Reading(found.marks, found.format, NAMES, tags=found.tags)
    transcript = Transcript(of.pieces, Prompt(ids(name, "x", kind), reading=how), (), 0)
    end = of.encode("<eos>", add_special_tokens=False)[-1]
    tokens = [*ids(name, text, kind, spelt), end]
    pieces = [
        transcript.push(Token("r", token, FinishReason.STOP if n == len(tokens) - 1 else None, 0.0))
        for n, token in enumerate(tokens)
    ]
    return read(how, pieces), pieces


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_a_template_writes_is_read_token_by_token(name: str, kind: str) -> None:
    for arguments in HARD if kind == "bytes" else HARD[:SPELT] + HARD[SPELT + 1 :]:
        text = written(name, ("look", arguments))
        found, pieces = said(name, text, kind=kind, spelt=json.dumps(arguments, ensure_ascii=False))
        ((called, given, ended),) = found.calls
        assert (called, ended, found.content) == ("look", True, "")
        assert json.loads(given) == arguments
        assert given in text  # byte for byte
        how = answer_format(tokenizer(name, kind))
        whole = read(Reading(how.marks, how.format, NAMES, tags=how.tags), ["".join(pieces)])
        assert whole == found


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form != "llama3_json"])
def test_several_calls_and_what_is_said_before_them(name: str) -> None:
    content = "" if name == "mistral_array" else "Let me see."
    text = written(name, ("look", HARD[1]), ("f", {}), ("look", HARD[3]), content=content)
    found, _ = said(name, text)
    assert [(called, json.loads(given)) for called, given, _ in found.calls] == [
        ("look", HARD[1]), ("f", {}), ("look", HARD[3]),
    ]  # fmt: skip
    assert found.content == content


@pytest.mark.parametrize("name", FORMATS)
def test_the_form_is_found_by_what_the_template_writes(name: str) -> None:
    found = answer_format(tokenizer(name))
    assert (found.shows_tools, found.calls) == (True, FORMATS[name])


@pytest.mark.parametrize("name", ["gemma4", "glm4moe", "gptoss", "lfm2_2_5", "qwen3_5_think", "deepseekv3", "phi3"])
def test_a_form_that_is_not_known_is_not_taken_for_another(name: str) -> None:
    assert answer_format(tokenizer(name)).calls is None


def test_a_named_form_is_taken_as_it_is_named() -> None:
    assert answer_format(tokenizer("phi3"), ToolCallParser.HERMES).calls == "hermes"
    assert not answer_format(tokenizer("phi3"), ToolCallParser.HERMES).shows_tools


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(["</tool_call>", "[TOOL_CALLS]", '"}', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral"])
def test_arguments_come_byte_for_byte_however_they_are_cut(form: str, held: bool) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None, deadline=None)
    @given(st.dictionaries(st.text(max_size=5), json_values, max_size=4), st.booleans(), st.integers(1, 11))
    def holds(arguments: dict[str, Any], ascii: bool, at_once: int) -> None:
        given = json.dumps(arguments, ensure_ascii=ascii)
        text = {
            "hermes": f'<tool_call>\n{{"name": "f", "arguments": {given}}}\n</tool_call>',
            "llama3_json": f'{{"name": "f", "parameters": {given}}}',
            "mistral": f"[TOOL_CALLS]f[ARGS]{given}",
        }[form]
        found = read(reading(form, held=held), cuts(text, at_once))
        assert found == Found(calls=[("f", given, True)])

    holds()


# ---- right values, of what others got wrong ----

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": {"y": 1}}}\n</tool_call>'
F = ("f", '{"x": {"y": 1}}', True)


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        # vLLM dropped the last brace where several tokens come at once
        (HERMES, CALL, Found(calls=[F])),
        # arguments of a function without any were dropped in streams
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', Found(calls=[("f", "{}", True)])),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', Found(calls=[("f", "{}", True)])),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', Found(calls=[("f", "{}", True)])),
        # escapes stay escapes, letters letters
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"a": "\\u00e9 é"}}</tool_call>',
            Found(calls=[("f", '{"a": "\\u00e9 é"}', True)]),
        ),
        # the one word for the other, and what is encoded twice
        (
            HERMES,
            '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>',
            Found(calls=[("f", '{"a": 1}', True)]),
        ),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            Found(calls=[("f", '{"a": 1}', True)]),
        ),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', Found(calls=[("f", '{"a": 1}', True)])),
        # text around calls; white space beside them is the template's
        (HERMES, f"Sure.\n{CALL}", Found("Sure.", calls=[F])),
        (HERMES, f"\n{CALL}\n{CALL}\n", Found(calls=[F, F])),
        (HERMES, f"A {{b}} {CALL} then\n{CALL} so. ", Found("A {b} then so. ", calls=[F, F])),
        # the end marker is missing where the answer ends
        (HERMES, CALL.removesuffix("\n</tool_call>"), Found(calls=[F])),
        (HERMES, CALL[:-4], Found(CALL[:-4])),
        # a call in a call's string is a string
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>{"}}</tool_call>',
            Found(calls=[("f", '{"a": "</tool_call><tool_call>{"}', True)]),
        ),
        (HERMES, f"<tool_call>oops {CALL}", Found("<tool_call>oops", calls=[F])),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', Found(calls=[("f", '{"a": 1}', True)])),
        (LLAMA, '{"name": "f", "arguments": {"a": 1}}', Found(calls=[("f", '{"a": 1}', True)])),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', Found(calls=[("f", "{}", True)])),
        (LLAMA, '{"type": "function", "name": "f", "parameters": {}}', Found(calls=[("f", "{}", True)])),
        # all but the first were dropped
        (
            LLAMA,
            '{"name": "f", "parameters": {"a": ";"}}; {"name": "look", "parameters": {}}\n{"name": "f"}',
            Found(calls=[("f", '{"a": ";"}', True), ("look", "{}", True), ("f", "{}", True)]),
        ),
        # JSON that is no call: an answer
        (LLAMA, '{"name": "Ann", "parameters": {"a": 1}}', Found('{"name": "Ann", "parameters": {"a": 1}}')),
        (LLAMA, '{"name": "f", "age": 3}', Found('{"name": "f", "age": 3}')),
        (LLAMA, 'See {"name": "f", "parameters": {}}', Found('See {"name": "f", "parameters": {}}')),
        (LLAMA, '{"name": "f"}; {"a": 1}', Found('; {"a": 1}', calls=[("f", "{}", True)])),
        (LLAMA, '{"name": "f"} so', Found(" so", calls=[("f", "{}", True)])),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]}}]', Found(calls=[("f", '{"a": [1]}', True)])),
        (
            MISTRAL,
            'Yes {"a"} [TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "look"}]',
            Found('Yes {"a"}', calls=[("f", "{}", True), ("look", "{}", True)]),
        ),
        (
            MISTRAL,
            '[TOOL_CALLS]f[ARGS]{"a": {"b": "}"}}[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{}',
            Found(calls=[("f", '{"a": {"b": "}"}}', True), ("look", "{}", True)]),
        ),
        # Devstral's, without [ARGS]
        (MISTRAL, '[TOOL_CALLS]create-file_1{"p": 1}', Found(calls=[("create-file_1", '{"p": 1}', True)])),
    ],
)
def test_right_values(how: Reading, text: str, expected: Found) -> None:
    assert read_all_ways(how, text) == expected


MALFORMED = [
    *((HERMES, f"a <tool_call>{text}</tool_call> b") for text in (
        "", "f", "[]", "{}", '{"arguments": {}}', '{"name": ""}', '{"name": 1}', '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": }}', '{"name": "f", "arguments": {"a": 1}', '{"name": "f", "name": "f"}',
        '{"name": "f", "arguments": "no"}', '{"name": "f", "more": 1}', '{"name": "f", "arguments": {\'a\': 1}}',
        '{"name": "f", "arguments": {"a": "line\nbreak"}}', '{"name": "\\ud800"}', '{"name": "f"} and',
    )),
    (HERMES, " <tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1"),
    (HERMES, "<tool_call"), (HERMES, "</tool_call>"), (HERMES, " \n "), (HERMES, "  a\n\n"),
    (LLAMA, '<|python_tag|>print("a")'), (LLAMA, '{"name": "f", "parameters": {"a": 1'), (LLAMA, "{"), (LLAMA, " "),
    (MISTRAL, "[TOOL_CALLS]"), (MISTRAL, "[TOOL_CALLS][]"), (MISTRAL, "[TOOL_CALLS] so"),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]"),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": 1}]'),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}'),
]  # fmt: skip


@pytest.mark.parametrize(("how", "text"), MALFORMED)
def test_what_is_no_call_is_content_byte_for_byte(how: Reading, text: str) -> None:
    assert read_all_ways(how, text) == Found(text)


@given(st.text(alphabet='<tool_cal>/{}":,nameargumts \nf[]TOLCS_1;') | st.text())
def test_nothing_is_lost_of_any_text(text: str) -> None:
    for how in (HERMES, LLAMA, MISTRAL):
        parser = AnswerParser(how)
        found = read(how, cuts(text, 2))
        assert found.calls or found.content == text
        assert parser.read(text, ended=True) or not text


# ---- held, cut, and counted ----


def test_arguments_that_a_grammar_holds_come_as_they_are_written() -> None:
    parser = AnswerParser(reading("hermes", held=True))
    head, tail = CALL[:44], CALL[44:]
    early = parser.read(head, ended=False)
    assert "".join(getattr(one, "text", "") for one in early) == '{"x":'
    late = parser.read(tail, ended=True)
    assert "".join(getattr(one, "text", "") for one in [*early, *late]) == F[1]


def test_a_free_call_comes_when_it_is_whole() -> None:
    parser = AnswerParser(HERMES)
    assert parser.read(CALL[:-1], ended=False) == []
    assert len(parser.read(CALL[-1], ended=False)) == 3


def test_a_held_call_that_is_cut_is_a_call_that_has_not_ended() -> None:
    how = reading("hermes", held=True)
    assert read_all_ways(how, CALL[:44]) == Found(calls=[("f", '{"x":', False)])
    assert read_all_ways(HERMES, CALL[:44]) == Found(CALL[:44])
    assert read_all_ways(how, CALL[:20]) == Found(CALL[:20])


def test_more_calls_than_are_wanted_are_left_out() -> None:
    assert read_all_ways(reading("hermes", most_calls=1), f"{CALL}\n{CALL}") == Found(calls=[F])


# ---- markers that are special tokens ----


def test_what_a_model_spells_is_no_marker_where_that_is_a_token() -> None:
    """The text of the token and the token are told apart; content shows the one, and never the other."""
    of, found = tokenizer("mistral_named"), answer_format(tokenizer("mistral_named"))
    (mark,) = [id for id, text in of.pieces.special.items() if text == "[TOOL_CALLS]"]
    letters = [one for letter in "[TOOL_CALLS]" for one in of.encode(letter, add_special_tokens=False)]
    call = ids("mistral_named", 'f[ARGS]{"a": 1}')
    how = Reading(found.marks, found.format, NAMES)

    def of_tokens(tokens: list[int]) -> Found:
        transcript = Transcript(of.pieces, Prompt([mark], reading=how), (), 0)
        return read(how, [*(transcript.push(Token("r", one, None, 0.0)) for one in tokens), transcript.end()])

    assert of_tokens([mark, *call]) == Found(calls=[("f", '{"a": 1}', True)])
    assert of_tokens([*letters, *call]) == Found('[TOOL_CALLS]f{"a": 1}')
    assert of_tokens([mark, *ids("mistral_named", "so")]) == Found("so")
    assert of_tokens([mark, *ids("mistral_named", 'f[ARGS]{"[ARGS]": 1}')]) == Found(calls=[("f", '{"": 1}', True)])
