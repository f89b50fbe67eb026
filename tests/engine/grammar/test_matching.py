"""What may come next in an answer, and where it may end: the troubles that other servers had with it, one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from grammars import END, JSON_OBJECT, allowed, choice, compiler, matching, regex, schema
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PLAIN_TEMPLATE, write_sentencepiece, write_tokenizer
from tokenizers import Tokenizer as Backend

from coserve_engine.errors import RequestError
from coserve_engine.grammar.source import WHITESPACE
from coserve_engine.grammar.vocabulary import read_vocabulary
from coserve_engine.messages import Grammar

TEXT = {"type": "string"}
SIZES: dict[str, tuple[Callable[[Path], int], int]] = {
    "bytes": (lambda folder: write_tokenizer(folder, PLAIN_TEMPLATE), END),
    "sentencepiece": (write_sentencepiece, 2),
}


class Writer:
    """A model's vocabulary, and texts as tokens of it, one byte each where there is no other way."""

    def __init__(self, folder: Path, size: int, end: int) -> None:
        self.end, self.folder, self.of = end, folder, compiler(folder, size, (end,))
        self.vocabulary = read_vocabulary(folder, size)
        self.special = set(self.vocabulary.special)
        self.ids = {
            token: id for id, token in reversed(list(enumerate(self.vocabulary.tokens))) if id not in self.special
        }

    def spelt(self, text: str) -> list[int]:
        """In single bytes."""
        return [self.ids[bytes([byte])] for byte in text.encode()]

    def after(self, grammar: Grammar, text: str = "", ends: Sequence[int] | None = None) -> set[int]:
        """What may follow a text."""
        return allowed(self.of, matching(self.of, grammar), self.spelt(text), ends)

    def bytes_after(self, grammar: Grammar, text: str = "") -> set[bytes]:
        return {self.vocabulary.tokens[id] for id in self.after(grammar, text) - {self.end}}

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether the whole text is an answer."""
        held, tokens = matching(self.of, grammar), self.spelt(text)
        for n in range(len(tokens)):
            if tokens[n] not in allowed(self.of, held, tokens[:n]):
                return False
        return self.end in allowed(self.of, held, tokens)


@pytest.fixture(scope="module", params=SIZES)
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write, end = SIZES[request.param]
    return Writer(folder, write(folder), end)


# ---- where an answer ends ----


def test_it_may_end_where_it_is_whole_and_nowhere_else(writer: Writer) -> None:
    many = regex("a+")
    assert writer.end not in writer.after(many)
    assert {writer.end} < writer.after(many, "a")
    assert writer.after(regex("a"), "a") == {writer.end}, "and must, where nothing else may follow"


def test_all_tokens_that_end_an_answer_end_it_there_alone(writer: Writer) -> None:
    """Models have several, and a request its own stop tokens: none cuts a text off (vllm#42403, vllm#52146)."""
    stops = (writer.end, writer.ids[b"}"], writer.ids[b"a"])
    held = matching(writer.of, schema({"type": "object", "required": ["a"]}), stops)
    for text in ("", "{", '{"a"', '{"a":"b'):
        assert not set(stops) & allowed(writer.of, held, writer.spelt(text), stops)
    with pytest.raises(RequestError, match="stop_token_ids"):
        allowed(writer.of, matching(writer.of, regex("b}"), stops), writer.spelt("b"), stops)
    whole = matching(writer.of, regex("b+"), stops)
    assert allowed(writer.of, whole, writer.spelt("b"), stops) >= {*stops, writer.ids[b"b"]}


def test_a_minimum_of_tokens_puts_the_end_off_only_while_something_else_may_follow(writer: Writer) -> None:
    """Or no token is left at all (vllm#53665)."""
    assert writer.end not in writer.after(regex("a+"), "a", ends=())
    assert writer.after(regex("a"), "a", ends=()) == {writer.end}


def test_behind_its_end_nothing_may_follow(writer: Writer) -> None:
    """A grammar that is through does not let go of the answer (vllm#29632)."""
    held = matching(writer.of, schema({"type": "boolean"}))
    assert allowed(writer.of, held, writer.spelt("true")) == {writer.end}
    assert allowed(writer.of, held, writer.spelt("true")) == {writer.end}, "however often it is asked"


# ---- special tokens ----


def test_no_special_token_is_in_a_text(writer: Writer) -> None:
    """Nor is it told from one that is spelt (guidance#1137, vllm#10363)."""
    for grammar, text in ((regex(r"(?s:.)*"), "a"), (JSON_OBJECT, '{"'), (schema(TEXT), '"')):
        assert not (writer.after(grammar, text) & writer.special) - {writer.end}
    name = writer.vocabulary.tokens[writer.end].decode()
    assert writer.takes(choice(name), name)
    assert writer.takes(schema(TEXT), json.dumps(name))


# ---- what a token writes ----


def test_a_character_may_be_spelt_in_bytes_and_is_never_left_broken(writer: Writer) -> None:
    held, tokens = matching(writer.of, schema({"enum": ["é", "好", "😀"]})), writer.spelt('"😀"')
    for n in range(1, len(tokens)):
        assert tokens[n] in allowed(writer.of, held, tokens[:n])
        if 1 < n < 5:
            assert not {writer.ids[b'"'], writer.end} & allowed(writer.of, held, tokens[:n])
    assert writer.takes(schema(TEXT), '"h\u00e9llo 好 😀"')


def test_no_text_has_a_byte_that_utf8_has_not(writer: Writer) -> None:
    never = {bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    for grammar, text in ((regex(r"(?s:.)*"), ""), (schema(TEXT), '"')):
        assert not never & writer.bytes_after(grammar, text)
        assert b"\x80" not in writer.bytes_after(grammar, text), "nor begins a character with its middle"


def test_two_tokens_that_write_the_same_may_both_come(tmp_path: Path) -> None:
    """`a` and `<0x61>`."""
    size = write_sentencepiece(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    both = {backend.token_to_id("e"), backend.token_to_id("<0x65>")}
    of = compiler(tmp_path, size, (2,))
    assert len(both) == 2
    assert allowed(of, matching(of, regex("e"))) == both


def test_ids_that_no_token_has_may_not_come(writer: Writer) -> None:
    """Models have more rows than their tokenizers tokens (vllm#16210, mlx-vlm#1917)."""
    size = len(writer.vocabulary.tokens)
    of = compiler(writer.folder, size + 45, (writer.end,))
    found = allowed(of, matching(of, regex(r"(?s:.)*")))
    assert max(found) < size
    assert found == writer.after(regex(r"(?s:.)*"))


def test_tokens_that_no_model_chooses_change_nothing(writer: Writer) -> None:
    """Tokenizers have more tokens than their models rows (vllm#33509)."""
    size = len(writer.vocabulary.tokens) - 9
    of = compiler(writer.folder, size, (writer.end,))
    found = allowed(of, matching(of, regex(r"(?s:.)*")))
    assert found == {id for id in writer.after(regex(r"(?s:.)*")) if id < size}


def test_the_model_spells_as_it_likes(writer: Writer) -> None:
    """Text that has to come is forced upon no one way to write it (llguidance#267)."""
    grammar = schema({"type": "object", "properties": {"the quick": TEXT}, "required": ["the quick"]})
    whole = '{"the quick"'
    for n in range(2, len(whole)):
        found = writer.bytes_after(grammar, whole[:n])
        assert whole[n].encode() in found
        assert all(whole[n:].encode().startswith(token) for token in found)
    assert len(writer.bytes_after(grammar, '{"the')) > 1


# ---- white space ----


def test_white_space_has_an_end(writer: Writer) -> None:
    """A model that is in doubt may write it until the last token (vllm#38696, xgrammar#412)."""
    most = int(WHITESPACE[WHITESPACE.rindex(",") + 1 : -1])
    spaces = {token for token in writer.ids if token and not token.strip(b" \n\r\t")}
    for text in ("{", '{"a"', '{"a":', '{"a":1', '{"a":[1,'):
        assert spaces & writer.bytes_after(JSON_OBJECT, text + " " * (most - 1))
        assert not spaces & writer.bytes_after(JSON_OBJECT, text + " " * most)
        assert not {b"{ ", b"\n\n"} & writer.bytes_after(JSON_OBJECT, text + " " * (most - 1))
    assert not spaces & writer.bytes_after(JSON_OBJECT)
    assert writer.after(JSON_OBJECT, "{}") == {writer.end}
    assert writer.takes(JSON_OBJECT, json.dumps({"a": [{"b": {"c": [1, 2]}}]}, indent=4))


# ---- each kind ----


@settings(max_examples=40)
@given(data=st.data(), choices=st.lists(st.text(max_size=6), min_size=1, max_size=5))
def test_an_answer_is_one_of_the_choices(writer: Writer, data: st.DataObject, choices: list[str]) -> None:
    """Those that begin as others do, that hold quotes or what a grammar's text is made of, and none at all included."""
    grammar = choice(*choices)
    assert writer.takes(grammar, data.draw(st.sampled_from(choices)))
    other = data.draw(st.text(max_size=6))
    assert writer.takes(grammar, other) == (other in choices)


@pytest.mark.parametrize("choices", [["a", "ab", "abc"], ["", "a"], ['"', "\\", "/", "\n"], ["start: /a/", "%json {}"]])
def test_choices_that_look_like_something_else(writer: Writer, choices: list[str]) -> None:
    assert all(writer.takes(choice(*choices), one) for one in choices)
    assert not writer.takes(choice(*choices), "abcd")


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        (r"a/b\n?", ["a/b", "a/b\n"], ["a\\/b", "a"]),
        (r"^\d{2,3}$", ["12", "123", "१२"], ["1", "1234", "1a"]),
        (r"(yes|no)( please)?", ["yes", "no please"], ["maybe", "yes "]),
        (r"[^\x00-\x7F]", ["é", "好"], ["a"]),
        ("(?i)ok", ["ok", "OK"], ["o"]),
        ("", [""], ["a"]),
        (r"\\", ["\\"], ["\\\\"]),
        ("a/\nb", ["a/\nb"], ["a/nb"]),
        (r".*", ["", "abc é"], ["a\nb"]),
        ("a|ab", ["a", "ab"], ["b"]),
    ],
)
def test_a_regular_expression_is_matched_by_the_whole_answer(
    writer: Writer, pattern: str, matched: list[str], others: list[str]
) -> None:
    assert [one for one in matched if not writer.takes(regex(pattern), one)] == []
    assert [one for one in others if writer.takes(regex(pattern), one)] == []


def test_a_json_object_is_one_and_nothing_else(writer: Writer) -> None:
    for value in ({}, {"a": None}, {"a": [1, -2.5e3, True, '\\"\n\u0001é'], "b": {"c": {}}}):
        assert writer.takes(JSON_OBJECT, json.dumps(value, ensure_ascii=False))
    for text in ("[]", "1", '"a"', "{'a':1}", '{"a":1,}', '{"a"}', "{} {}", " {}", '{"a":NaN}', '{"a":01}'):
        assert not writer.takes(JSON_OBJECT, text)


def test_names_stand_in_the_schemas_order_and_others_behind_them(writer: Writer) -> None:
    document = {"type": "object", "properties": {"b": TEXT, "a": TEXT}, "required": ["a"]}
    assert writer.takes(schema(document), '{"b":"","a":""}')
    assert writer.takes(schema(document), '{"a":"","c":1}')
    assert not writer.takes(schema(document), '{"a":"","b":""}')
    assert not writer.takes(schema(document), '{"b":""}')
    assert not writer.takes(schema(document | {"additionalProperties": False}), '{"a":"","c":1}')


# ---- what goes wrong on the way ----


def test_an_answer_that_left_its_grammar_fails_and_does_not_go_on(writer: Writer) -> None:
    """Nor does it end as if it were whole, or hang (vllm#18780)."""
    held = matching(writer.of, regex("ab"))
    for _ in range(2):
        with pytest.raises(RequestError, match="behind 1 tokens") as error:
            allowed(writer.of, held, writer.spelt("b"))
    assert error.value.field == "grammar"


def test_a_grammar_that_grows_too_large_on_the_way_fails(writer: Writer) -> None:
    many = {"type": "object", "properties": {f"p{n}": TEXT for n in range(3000)}}
    with pytest.raises(RequestError, match="cannot be followed"):
        writer.after(schema(many), "{")


def test_its_place_is_a_function_of_the_tokens(writer: Writer) -> None:
    tokens = writer.spelt('{"a":[1,2,{"b":"c"}]}')
    one = matching(writer.of, JSON_OBJECT)
    by_one = [allowed(writer.of, one, tokens[:n]) for n in range(len(tokens) + 1)]
    for n in (0, 1, 7, len(tokens)):
        assert allowed(writer.of, matching(writer.of, JSON_OBJECT), tokens[:n]) == by_one[n]
    assert len({frozenset(found) for found in by_one}) > 5


def test_bits_of_a_word_are_told_apart(tmp_path: Path) -> None:
    """The last of a number has its sign; end tokens of every place in it."""
    size = write_tokenizer(tmp_path, PLAIN_TEMPLATE)
    for end in (0, 1, 2, 3, 31, 32, 63, 64, 95):
        of = compiler(tmp_path, size, (end,))
        assert allowed(of, matching(of, regex("é")), []) != {end}
        held = matching(of, regex("é"))
        first = next(id for id, token in enumerate(read_vocabulary(tmp_path, size).tokens) if token == "é".encode()[:1])
        second = next(
            id for id, token in enumerate(read_vocabulary(tmp_path, size).tokens) if token == "é".encode()[1:]
        )
        assert allowed(of, held, [first, second]) == {end}
