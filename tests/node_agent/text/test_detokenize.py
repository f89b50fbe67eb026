"""Pieces of text: whole characters, nothing lost, nothing of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.text.detokenize import Detokenizer, StopStrings
from coserve_agent.text.marks import Marks, unmarked
from coserve_agent.text.pieces import Pieces

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ("tokenizer", "sentencepiece_tokenizer")


@pytest.fixture(params=KINDS)
def either(request: pytest.FixtureRequest) -> Tokenizer:
    """A byte-level tokenizer, and one like Llama 2's."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def parts_of(pieces: Pieces, tokens: list[int], before: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(pieces, before or [])
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@FIXTURE
@given(text=st.text(max_size=60))
def test_parts_join_to_the_text(either: Tokenizer, text: str) -> None:
    tokens = either.encode(text)
    parts = parts_of(either.pieces, tokens)
    assert "".join(parts) == either.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@FIXTURE
@given(tokens=st.lists(st.integers(0, 400), max_size=40))
def test_parts_of_any_bytes_join_to_the_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Broken characters and ids that no token has included."""
    assert "".join(parts_of(tokenizer.pieces, tokens)) == tokenizer.decode(tokens)


@FIXTURE
@given(
    runs=st.lists(st.one_of(st.lists(st.integers(259, 400), max_size=3), st.text("aé好😎\n ", max_size=3)), max_size=9)
)
def test_parts_of_words_and_bytes_join_to_the_text(
    sentencepiece_tokenizer: Tokenizer, runs: list[list[int] | str]
) -> None:
    """Words in any order between characters that are spelt in bytes."""
    tokens: list[int] = []
    for run in runs:
        spelt = [3 + byte for byte in run.encode()] if isinstance(run, str) else run
        tokens += spelt
    pieces = sentencepiece_tokenizer.pieces
    assert "".join(parts_of(pieces, tokens)) == sentencepiece_tokenizer.decode(tokens)


@FIXTURE
@given(before=st.text(min_size=1, max_size=12), after=st.lists(st.integers(0, 374), max_size=12))
def test_text_goes_on_behind_a_prompt(either: Tokenizer, before: str, after: list[int]) -> None:
    """What the decoder writes for both together begins with the prompt's text. (Bytes that make no character are left
    to the other tests: in a broken run the decoder writes U+FFFD for its good characters, too.)
    """
    prompt = either.encode(before)
    tokens = [token for token in after if not 3 <= token < 259]
    if tokens and "\ufffd" not in either.decode([*prompt, *tokens]):
        text = either.decode([*prompt, *tokens])[len(either.decode(prompt)) :]
        assert "".join(parts_of(either.pieces, tokens, prompt)) == text


def test_the_space_before_the_first_word_is_kept_behind_a_prompt(sentencepiece_tokenizer: Tokenizer) -> None:
    pieces = sentencepiece_tokenizer.pieces
    hello, world = sentencepiece_tokenizer.encode("hello"), sentencepiece_tokenizer.encode("world")[1:]
    assert sentencepiece_tokenizer.decode(world) == "world", "what the decoder alone makes of it"
    assert "".join(parts_of(pieces, world)) == "world"
    assert "".join(parts_of(pieces, world, hello)) == " world"
    assert "".join(parts_of(pieces, world, [*hello, 2, 2, 2, 2, 2, 2])) == " world", "special tokens are no text"
    assert "".join(parts_of(pieces, world, [1])) == "world", "nor is a begin token before it"


@pytest.mark.parametrize(("cut", "text"), [(1, "😎b"), (2, "😎b"), (3, "😎b")])
def test_an_answer_ends_the_character_that_the_prompt_began(
    sentencepiece_tokenizer: Tokenizer, cut: int, text: str
) -> None:
    *_, first, second, third, last, b = sentencepiece_tokenizer.encode("a😎b")
    emoji = [first, second, third, last]
    assert "".join(parts_of(sentencepiece_tokenizer.pieces, [*emoji[cut:], b], emoji[:cut])) == text


def test_a_character_of_three_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a😎b")
    assert len(tokens) == 5
    assert parts_of(tokenizer.pieces, tokens) == ["a", "", "", "😎", "b", ""]


def test_a_line_break_that_is_a_byte_comes_at_once(sentencepiece_tokenizer: Tokenizer) -> None:
    """Stop strings wait for it."""
    tokens = sentencepiece_tokenizer.encode("a\n")[-1:]
    assert parts_of(sentencepiece_tokenizer.pieces, tokens) == ["\n", ""]


def test_an_unfinished_character_shows_at_the_end(either: Tokenizer) -> None:
    tokens = either.encode("a😎")[:-1]
    assert "".join(parts_of(either.pieces, tokens)) == either.decode(tokens)
    assert parts_of(either.pieces, tokens)[-1].strip("\ufffd") == ""


def test_special_tokens_show_nothing_and_cost_nothing(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    assert end is not None
    tokens = [*tokenizer.encode("one"), *[end] * 500, *tokenizer.encode(" two")]
    assert "".join(parts_of(tokenizer.pieces, tokens)) == "one two"


SPACES = decoders.Replace("▁", " ")
BYTES, FUSE = decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "llama": decoders.Sequence([SPACES, BYTES, FUSE, decoders.Strip(content=" ", left=1)]),
    "gemma": decoders.Sequence([SPACES, BYTES, FUSE]),
    "mistral": decoders.Sequence([BYTES, decoders.Metaspace(prepend_scheme="first")]),
    "metaspace": decoders.Metaspace(),
    "never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "none": None,
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
@FIXTURE
@given(tokens=st.lists(st.integers(0, 16), max_size=9), cut=st.integers(0, 9))
def test_any_decoder_that_writes_words_one_by_one_will_do(decoder: Any, tokens: list[int], cut: int) -> None:
    """Added tokens, special ones and ids without a token included; cut anywhere, the rest goes on behind the prompt."""
    words = ["<unk>", "▁Hello", "▁world", "▁", "▁▁", "!", "##s", "é", "好", "\ufffd", "<0x0A>"]
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<end>"])
    backend.add_tokens(["<tool>", " two words"])
    text, pieces = backend.decode(tokens), Pieces(backend)
    assert "".join(parts_of(pieces, tokens)) == text
    assert "".join([*parts_of(pieces, tokens[:cut]), *parts_of(pieces, tokens[cut:], tokens[:cut])]) == text


@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_at_the_first_wherever_the_pieces_break(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for part in parts:
        shown += matcher.push(part)
        assert not any(stop in shown for stop in stops)
    if matcher.found is None:
        shown += matcher.flush()
    text = "".join(parts)
    hits = [text.index(stop) for stop in stops if stop in text]
    assert (matcher.found is not None) == bool(hits)
    if not hits:
        assert shown == text
    else:
        assert matcher.found is not None
        assert text.startswith(shown + matcher.found)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    matcher = StopStrings(["END", "\n\n"])
    assert [matcher.push(part) for part in ("hello ", "E", "N", "x", "\n")] == ["hello ", "", "", "ENx", ""]
    assert matcher.flush() == "\n"


@pytest.mark.parametrize(
    ("stops", "tokens", "shown", "found"),
    [
        (["<|end|>"], ["one", "<|end|>", " two"], "one", "<|end|>"),
        (["e<|end|>"], ["one", "<|end|>", " two"], "on", "e<|end|>"),
        (["<|end|>\n"], ["one", "<|end|>", "\n", "x"], "one", "<|end|>\n"),
        (["<|end|>\n"], ["one", "<|end|>", " two"], "one two", None),
        (["<|end|><|user|>"], ["one", "<|end|>", "<|user|>"], "one", "<|end|><|user|>"),
        (["end", "|>"], ["one", "<|end|>", " two"], "one two", None),
        (["ne t"], ["one", "<|end|>", " two"], "o", "ne t"),
        (["ne t", "<|end|> two"], ["one", "<|end|>", " two"], "o", "ne t"),
        (["<|end|>"], ["on<|e", "nd|>", "x"], "on", "<|end|>"),
    ],
)
def test_special_tokens_are_not_shown_but_stop(
    stops: list[str], tokens: list[str], shown: str, found: str | None
) -> None:
    special = ("<|end|>", "<|user|>")
    matcher = StopStrings(stops, special)
    text = "".join(matcher.push("", token) if token in special else matcher.push(token) for token in tokens)
    assert (text + matcher.flush(), matcher.found) == (shown, found)


@given(st.text("abcEND ", max_size=12), st.data())
def test_marks_stay_in_a_text_and_no_stop_string_sees_them(text: str, data: st.DataObject) -> None:
    marks = Marks(["[A]", "[B]"], {1: "[A]", 2: "[B]", 3: "[C]"})
    assert marks.of.keys() == {1, 2} and marks.seen("[C]") == "[C]"
    marked = text
    for token in data.draw(st.lists(st.sampled_from([1, 2]), max_size=3)):
        at = data.draw(st.integers(0, len(marked)))
        marked = marked[:at] + marks.of[token] + marked[at:]
    assert unmarked(marked) == text
    plain, matcher = StopStrings(["END", "a b"], ["[A]"]), StopStrings(["END", "a b"], ["[A]"])
    expected = plain.push(text) + plain.flush()
    found = "".join(matcher.push(letter) for letter in marked) + matcher.flush()
    assert (unmarked(found), matcher.found) == (expected, plain.found)
    assert found == marked[: len(found)]
