"""Pieces of text: whole characters, nothing lost, nothing of a stop string."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from coserve_agent.detokenize import Detokenizer, StopStrings
from coserve_agent.tokenizer import Tokenizer

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def pieces(decode: object, tokens: list[int], special: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = Detokenizer(decode, special)  # type: ignore[arg-type]
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@FIXTURE
@given(st.text(max_size=60))
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    parts = pieces(tokenizer.decode, tokens, tokenizer.special_ids)
    assert "".join(parts) == tokenizer.decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@FIXTURE
@given(st.lists(st.integers(0, 250), max_size=40))
def test_pieces_of_broken_bytes_join_to_the_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    joined = "".join(pieces(tokenizer.decode, tokens, tokenizer.special_ids))
    whole = tokenizer.decode(tokens)
    if not any(part.startswith("\ufffd" * 4) for part in whole.split()):
        assert len(joined) == len(whole) or joined == whole


def test_a_character_of_three_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a😎b")
    assert len(tokens) == 5
    assert pieces(tokenizer.decode, tokens) == ["a", "", "", "😎", "b", ""]


def test_an_unfinished_character_shows_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a😎")[:-1]
    assert pieces(tokenizer.decode, tokens)[-1] == "\ufffd"


def test_special_tokens_show_nothing_and_cost_nothing(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    assert end is not None
    tokens = [*tokenizer.encode("one"), *[end] * 500, *tokenizer.encode(" two")]
    assert "".join(pieces(tokenizer.decode, tokens, tokenizer.special_ids)) == "one two"


def test_leading_spaces_survive_a_decoder_that_strips_them() -> None:
    """As in sentencepiece models: the first space of a decoded text is dropped."""
    vocab = {"▁Hello": 0, "▁world": 1, "▁": 2, "!": 3}
    backend = Backend(models.WordLevel(vocab, unk_token="!"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    for tokens in ([0, 1, 3], [0, 1, 1, 0, 2, 2, 1], [2, 0, 1]):
        assert "".join(pieces(backend.decode, tokens)) == backend.decode(tokens)


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
