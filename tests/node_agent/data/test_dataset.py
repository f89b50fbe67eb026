"""The usable lines of a file, which of their tokens are learned, and what is said about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_rows import GOOD, TURNS, learned, line_of, load, reader_of, samples_of, write

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.problems import LineError
from coserve_agent.errors import DatasetError
from coserve_api.job import DatasetFormat, OnInvalid
from coserve_api.job_status import FailedReason

# ---- what is learned ----


def test_messages_learn_the_assistants_turns(tokenizer: Tokenizer) -> None:
    text, part = learned(tokenizer, {"messages": TURNS})
    assert text == "<|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>four é😀<|end|>"
    assert part == "two<|end|>four é😀<|end|>"


def test_a_template_without_generation_blocks_gives_the_same(tokenizer: Tokenizer, plain_tokenizer: Tokenizer) -> None:
    row = {"messages": TURNS}
    assert samples_of(tokenizer, row) == samples_of(plain_tokenizer, row)
    assert tokenizer.digest != plain_tokenizer.digest


def test_a_prompt_is_the_beginning_of_its_training_text(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_chat(TURNS[:3])
    (sample,) = samples_of(tokenizer, {"messages": TURNS})
    assert sample.tokens[: len(prompt)] == tuple(prompt)


def test_prompt_and_completion_learn_the_completion(tokenizer: Tokenizer) -> None:
    row = {"prompt": "one two", "completion": " three", "other": 1}
    assert learned(tokenizer, row) == ("one two three<|end|>", " three<|end|>")


def test_text_learns_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    text, part = learned(tokenizer, {"text": "one two"})
    assert text == "one two<|end|>"
    assert text.endswith(part)
    assert len(tokenizer.encode(text)) == len(tokenizer.encode(part)) + 1
    assert learned(tokenizer, {"text": "one two<|end|>"})[0] == text


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": TURNS}, DatasetFormat.MESSAGES),
        ({"prompt": "a", "completion": "b"}, DatasetFormat.PROMPT_COMPLETION),
        ({"text": "one two"}, DatasetFormat.TEXT),
    ],
)
def test_the_first_line_tells_the_format(
    tmp_path: Path, tokenizer: Tokenizer, row: object, format: DatasetFormat
) -> None:
    dataset = load(write(tmp_path, b"", row, row), tokenizer)
    assert dataset.reader.format is format
    assert dataset.ids == (2, 3)


def test_samples_are_read_again_in_any_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": f"one {n}"} for n in range(6)]
    path = write(tmp_path, *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    dataset = load(path, tokenizer)
    samples = dataset.samples((5, 1))
    assert [tokenizer.decode(sample.tokens) for sample in samples] == ["one 4", "one 0"]
    assert [sample.id for sample in samples] == [5, 1]
    path.write_bytes(path.read_bytes().replace(b"one 4", b"one 9"))
    assert dataset.samples((1,)) == samples[1:]
    with pytest.raises(DatasetError, match="line 5: changed"):
        dataset.samples((1, 5))


# ---- what cannot be used ----

BAD = [
    (b"{", ["is not JSON"]),
    (b"[1]", ["JSON list", "object", "jq"]),
    (b"[", ["is not JSON", "object", "jq"]),
    (b'{"messages": "\xff"}', ["UTF-8"]),
    ({"text": "one"}, ["is of format text", "read as messages"]),
    ({"text": ""}, ["messages is missing"]),
    ({"messages": []}, ["messages is []"]),
    ({"messages": ["x"]}, ["messages[0] is 'x'"]),
    ({"messages": [{"role": "user", "content": 5}]}, ["messages[0].content is 5", "string"]),
    ({"messages": [{"content": "x"}]}, ["messages[0].role is missing"]),
    ({"messages": TURNS[:1]}, ["no assistant message"]),
    (b'{"messages": 1, "messages": 2}', ["'messages' stands twice"]),
    (b'{"messages": NaN}', ["NaN is no number"]),
    (b'{"messages": 1e999}', ["1e999 is beyond the range"]),
    (b'{"messages": ' + b"9" * 5000 + b"}", ["is not JSON", "digits"]),
    (b'{"messages": ' + b"[" * 100_000, ["is not JSON", "recursion"]),
    ({"messages": [{"role": "system", "content": "x"}, *TURNS[:2]]}, ["no role system", "chat template"]),
    ({"messages": [TURNS[0], {"role": "assistant", "content": "two " * 99}]}, ["tokens, more than", "Skip"]),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[" ".join(words) for _, words in BAD])
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, row: object, words: list[str]) -> None:
    path = write(tmp_path, GOOD, row, GOOD)
    with pytest.raises(DatasetError) as caught:
        load(path, tokenizer)
    assert caught.value.line == 2
    assert caught.value.reason is FailedReason.INVALID_DATASET
    with pytest.raises(LineError) as quoting:
        raw = path.read_bytes().splitlines(keepends=True)[1]
        reader_of(tokenizer).detected(line_of(GOOD)).read(2, raw)
    assert all(word in str(quoting.value) for word in words), str(quoting.value)
    assert str(caught.value) == f"{path}, line 2: {quoting.value.public}"
    skipping = load(path, tokenizer, OnInvalid.SKIP)
    assert (skipping.ids, skipping.problems.lines) == ((1, 3), 1)


@pytest.mark.parametrize(
    ("row", "format", "words"),
    [
        ({"prompt": "a", "completion": ""}, DatasetFormat.PROMPT_COMPLETION, "completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, DatasetFormat.PROMPT_COMPLETION, "prompt and completion are"),
        ({"text": ""}, DatasetFormat.TEXT, "text is empty"),
        ({"text": None}, DatasetFormat.TEXT, "text is missing"),
    ],
)
def test_other_formats_name_their_fields(
    tmp_path: Path, tokenizer: Tokenizer, row: object, format: DatasetFormat, words: str
) -> None:
    with pytest.raises(DatasetError, match=words):
        load(write(tmp_path, row), tokenizer, format=format)


def test_files_that_cannot_be_used_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DatasetError, match="no such file") as missing:
        load(tmp_path / "absent.jsonl", tokenizer)
    assert missing.value.reason is FailedReason.DATASET_NOT_FOUND
    assert "absent.jsonl" in str(missing.value)
    with pytest.raises(DatasetError, match=r"is a folder without .jsonl, .jsonl.gz, .parquet files"):
        load(tmp_path, tokenizer)
    with pytest.raises(DatasetError, match="it is empty"):
        load(write(tmp_path, b"", b"  "), tokenizer)
    with pytest.raises(
        DatasetError, match=r"none of its 1 lines can be used \(UnknownFormat 1\); line 1: has answer, question"
    ):
        load(write(tmp_path, {"question": "a", "answer": "b"}), tokenizer, OnInvalid.SKIP)
    with pytest.raises(DatasetError, match=r"none of its 2 lines can be used \(NotJson 2\); line 1: is not JSON"):
        load(write(tmp_path, b"{", b"}"), tokenizer, OnInvalid.SKIP)


def test_half_of_a_surrogate_pair_is_a_line_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = b'{"messages": [{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "b"}]}'
    with pytest.raises(DatasetError, match=r"line 2: messages holds half of a surrogate pair, which"):
        load(write(tmp_path, GOOD, line), tokenizer)
    assert load(write(tmp_path, GOOD, line), tokenizer, OnInvalid.SKIP).problems.lines == 1


def test_a_bad_first_line_can_be_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(write(tmp_path, b"#", GOOD), tokenizer, OnInvalid.SKIP)
    assert (dataset.ids, dataset.problems.lines, dataset.reader.format) == ((2,), 1, DatasetFormat.MESSAGES)


@pytest.mark.parametrize("row", [{"text": ""}, {"prompt": "one", "completion": ""}, {"messages": [1]}])
def test_a_line_that_cannot_be_used_decides_no_format(tmp_path: Path, tokenizer: Tokenizer, row: object) -> None:
    path = write(tmp_path, row, {"text": "one"} if "messages" in str(row) else GOOD)
    assert load(path, tokenizer, OnInvalid.SKIP).ids == (2,)


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_to_each(tmp_path: Path, model_folder: Path) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    first, second = samples_of(tokenizer, {"messages": TURNS})
    assert [one.turn for one in (first, second)] == [0, 1]
    assert tokenizer.decode(first.tokens, False) == "1onetwo<|end|>"
    assert tokenizer.decode(second.tokens, False) == "3one3two3threefour é😀<|end|>"
