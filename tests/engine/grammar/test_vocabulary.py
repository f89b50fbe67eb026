"""What each token writes, against what tokenizers' own decoder makes of it, for each kind of tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KINDS, write_folder
from hypothesis import given
from hypothesis import strategies as st
from small_models import PLAIN_TEMPLATE, write_sentencepiece, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from coserve_engine.errors import ModelFolderError
from coserve_engine.grammar.vocabulary import read_vocabulary

SPACES, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "llama": decoders.Sequence([SPACES, BYTES, FUSE, decoders.Strip(content=" ", left=1)]),
    "gemma": decoders.Sequence([SPACES, BYTES, FUSE]),
    "mistral": decoders.Sequence([BYTES, decoders.Metaspace(prepend_scheme="first")]),
    "metaspace": decoders.Metaspace(),
    "never": decoders.Metaspace(prepend_scheme="never"),
}
"""What makes a text of pieces of text."""
WORDS = ["<unk>", "▁Hello", "▁world", "▁", "▁▁", "!", "##s", "é", "好", "\ufffd", "<0x0A>", "<0xE5>", "▁é"]


def write_words(folder: Path, decoder: Any) -> Backend:
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<end>"])
    backend.add_tokens(["<tool>", " two words"])
    backend.save(str(folder / "tokenizer.json"))
    return backend


def write_unigram(folder: Path) -> int:
    scored = [(piece, -float(n)) for n, piece in enumerate([*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))])]
    backend = Backend(models.Unigram(list(dict(scored).items()), 0, byte_fallback=True))
    backend.decoder = DECODERS["gemma"]
    backend.add_special_tokens(["<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    return int(backend.get_vocab_size())


FOLDERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda folder: write_tokenizer(folder, PLAIN_TEMPLATE),
    "sentencepiece": write_sentencepiece,
    "unigram": write_unigram,
    "base model": lambda folder: (folder / "tokenizer.json").write_bytes(
        (Path(__file__).parents[3] / "examples" / "base-model" / "tokenizer.json").read_bytes()
    ),
    **{f"chat {kind}": lambda folder, kind=kind: write_folder(folder, "<|im_start|>[INST]", kind) for kind in KINDS},
    **{name: lambda folder, decoder=decoder: write_words(folder, decoder) for name, decoder in DECODERS.items()},
}


@pytest.fixture(scope="module", params=FOLDERS, ids=[name.replace(" ", "_") for name in FOLDERS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    FOLDERS[request.param](path)
    return path


def backend_of(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


def test_a_text_is_its_tokens_bytes_in_a_row(folder: Path) -> None:
    backend = backend_of(folder)
    size = backend.get_vocab_size()
    vocabulary = read_vocabulary(folder, size)
    anchor = next(id for id in range(size) if vocabulary.tokens[id][-1:].isalpha() and id not in vocabulary.special)
    before = backend.decode([anchor], skip_special_tokens=False)
    plain = [id for id in range(size) if id not in vocabulary.special]
    assert len(plain) > 5

    @given(st.lists(st.sampled_from(plain), max_size=9))
    def check(tokens: list[int]) -> None:
        written = b"".join(vocabulary.tokens[id] for id in tokens)
        text = backend.decode([anchor, *tokens], skip_special_tokens=False)
        assert text == before + written.decode(errors="replace") or "\ufffd" in text

    check()


def test_each_piece_alone_writes_its_text(folder: Path) -> None:
    """Where it is whole characters: broken ones are not compared above."""
    backend = backend_of(folder)
    vocabulary, compared = read_vocabulary(folder, backend.get_vocab_size()), 0
    anchor = next(
        id for id, token in enumerate(vocabulary.tokens) if token[-1:].isalpha() and id not in vocabulary.special
    )
    before = backend.decode([anchor], skip_special_tokens=False)
    for id, token in enumerate(vocabulary.tokens):
        text = backend.decode([anchor, id], skip_special_tokens=False)
        if id not in vocabulary.special and "\ufffd" not in text:
            assert text == before + token.decode(), (id, backend.id_to_token(id))
            compared += 1
    assert compared > 5


def test_special_tokens_are_set_apart(folder: Path) -> None:
    backend = backend_of(folder)
    vocabulary = read_vocabulary(folder, backend.get_vocab_size())
    special = {id for id, one in backend.get_added_tokens_decoder().items() if one.special}
    assert special <= set(vocabulary.special)
    assert all(vocabulary.tokens[id].decode().startswith("<") or id in special for id in vocabulary.special), (
        "and markup, whatever the tokenizer calls it"
    )


def test_single_bytes_are_bytes(tmp_path: Path) -> None:
    size = write_sentencepiece(tmp_path)
    vocabulary, backend = read_vocabulary(tmp_path, size), backend_of(tmp_path)
    found = {vocabulary.tokens[backend.token_to_id(f"<0x{byte:02X}>")] for byte in range(256)}
    assert found == {bytes([byte]) for byte in range(255)} | {b""}, "no text has the last"


def test_ids_without_a_token_write_nothing_and_those_that_no_model_chooses_are_left_out(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path, PLAIN_TEMPLATE)
    whole = read_vocabulary(tmp_path, size)
    longer, shorter = read_vocabulary(tmp_path, size + 40), read_vocabulary(tmp_path, size - 7)
    assert longer.tokens == [*whole.tokens, *[b""] * 40]
    assert shorter.tokens == whole.tokens[:-7]
    assert max(shorter.special) < size - 7


def test_tokens_that_tokenizer_config_adds_or_makes_special_are_special(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path, PLAIN_TEMPLATE)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    word = backend_of(tmp_path).id_to_token(size - 1)
    config |= {"added_tokens_decoder": {str(size): {"content": "<later>", "special": True}}, "sep_token": word}
    config["cls_token"] = {"content": backend_of(tmp_path).id_to_token(size - 2)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = read_vocabulary(tmp_path, size + 1)
    assert {size, size - 1, size - 2} <= set(vocabulary.special)
    assert vocabulary.tokens[size] == b"<later>"


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Strip(content="▁", left=1), "Strip"),
        (None, "no decoder"),
    ],
    ids=["wordpiece", "bpe", "ctc", "strip", "none"],
)
def test_tokens_that_write_what_their_neighbours_decide_are_refused(tmp_path: Path, decoder: Any, named: str) -> None:
    write_words(tmp_path, decoder)
    with pytest.raises(ModelFolderError, match=named):
        read_vocabulary(tmp_path, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON"),
        ('{"decoder": {"type": "ByteLevel"}}', "model"),
        ('{"decoder": {"type": "ByteLevel"}, "model": {"vocab": 7}}', "as tokenizers writes it"),
        ('{"decoder": {"type": "Sequence"}, "model": {"vocab": {}}}', "as tokenizers writes it"),
        ('{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {}}, "added_tokens": [{}]}', "as tokenizers writes it"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFolderError, match=said) as error:
        read_vocabulary(tmp_path, 8)
    assert "tokenizer.json" in str(error.value)
