"""`coserve data` shows what the shards hold, names every line that is not in them, and says by its exit
status whether a job would take the data.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import GOOD, TURNS, write
from previewing import FIT, UNFIT, look, look_here

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.data.problems import Reason
from coserve_agent.data.rendering import Renderer
from coserve_agent.model.vocabulary import vocab_size
from coserve_agent.settings import FeederSettings

FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else 'shorter' }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{{ '' if enable_thinking is defined else '' }}"
)
"""Writes earlier answers differently later, so that each needs a sequence of its own."""


def shards(path: Path, model: Path, **changes: Any) -> list[tuple[int, tuple[int, ...], tuple[bool, ...]]]:
    """Of each sample that the feeder would push: its turn, its tokens, and which are learned, in the file's order."""
    material = prepared(path, model, **changes)
    samples = [sample for step in range(1, material.train.total_steps + 1) for sample in material.shard(step).samples]
    samples.sort(key=lambda one: (one.id, one.turn))
    return [(one.turn, one.tokens, tuple(map(bool, one.weights))) for one in samples]


def prepared(path: Path, model: Path, **changes: Any) -> Material:
    fields: dict[str, Any] = {
        "redis_url": "redis://x", "endpoint_uid": "e", "job_uid": "j", "job_name": "j", "dataset_path": path,
        "dataset_root": path.parent, "model_path": model, "eval_percent": 0, "epochs": 1,
    }  # fmt: skip
    tokenizer = Tokenizer(model)
    settings = FeederSettings(**fields | changes)
    renderer = Renderer(tokenizer, end_tokens(model, tokenizer), settings.template_variables)
    return Material.prepare(settings, renderer, vocab_size(model))


def shown(output: str) -> list[tuple[int, tuple[int, ...], tuple[bool, ...]]]:
    """The same, as `--ids` shows it."""
    samples = []
    for block in re.split(r"(?m)^line ", output)[1:]:
        found = re.findall(r"(?m)^  │ +\d+ +(\d+(?: \d+)*)  (.*)$", block)
        if found:
            turn = re.match(r"\d+, turn (\d+)", block)
            tokens = [(int(one), text.startswith("«")) for ids, text in found for one in ids.split()]
            learned = tuple(flag for _, flag in tokens)
            samples.append((int(turn[1]) if turn else 0, tuple(token for token, _ in tokens), learned))
    return samples


@pytest.fixture(scope="session")
def forgetful(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("forgetful")
    config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": FORGETFUL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    return folder


ROWS = [
    GOOD,
    {"messages": TURNS},
    {"messages": [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "\n\tb\u200b «c» 😀\n"}]},
]


@pytest.mark.parametrize("model", ["model_folder", "sentencepiece", "forgetful"])
def test_the_mask_is_the_shards(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    path = write(tmp_path, *ROWS)
    done = look(path, "--model", folder, "--ids")
    assert done.returncode == FIT
    found = shown(done.stdout)
    assert found == shards(path, folder)
    assert len(found) == (3 if model == "model_folder" else 4)
    assert found != shards(path, folder, learn="Last"), "negative control"


def test_arguments_are_the_jobs(tmp_path: Path, forgetful: Path) -> None:
    path = write(tmp_path, *ROWS)
    done = look(
        path, "--model", forgetful, "--ids", "--learn", "Last", "--format", "messages", "--max-length", 60,
        "--template-variables", '{"enable_thinking": false}', "--date", "2026-07-26", "--lines", 2,
    )  # fmt: skip
    expected = shards(path, forgetful, learn="Last", max_sequence_length=60)
    assert shown(done.stdout) == expected[:2]


def test_each_character_can_be_seen(tmp_path: Path, model_folder: Path) -> None:
    said = "it is\n4\t\u001b[31m «é😀» \\n\u202e"
    path = write(
        tmp_path, {"messages": [{"role": "user", "content": "one \r\n"}, {"role": "assistant", "content": said}]}
    )
    done = look(path, "--model", model_folder)
    block = done.stdout.split("line 1: ")[1].split("\n\n")[0].partition("\n")[2]
    assert block == (
        "  │ ⟦<|user|>⟧one ⟨U+000D⟩↵\n"
        "  │ ⟦<|end|>⟧⟦<|assistant|>⟧«it is↵\n"
        "  │ 4⇥⟨U+001B⟩[31m ⟨U+00AB⟩é😀⟨U+00BB⟩ \\n⟨U+202E⟩⟦<|end|>⟧»"
    )


def test_what_is_said_is_what_the_job_would_say(tmp_path: Path, forgetful: Path) -> None:
    rows = [{"messages": TURNS, "id": n, "source": "x"} for n in range(9)]
    path = write(tmp_path, *rows, b"", {"messages": TURNS[:2], "id": 9})
    done = look(path, "--model", forgetful, "--epochs", 3, "--batch-size", 4, "--lines", 0)
    material = prepared(path, forgetful, batch_size=4, epochs=3)
    status, weights = material.status(), [flag for _, _, flags in shards(path, forgetful) for flag in flags]
    text = done.stdout.replace(",", "")
    assert (status.samples, status.sequences, status.total_steps) == (10, 19, 9)
    assert "10 lines 19 sequences" in text
    assert f"an epoch  {status.tokens} tokens {sum(weights)} of them learned" in text
    assert f"3 epochs  {3 * status.tokens} tokens; 9 steps" in text
    assert "id (10) source (9)" in text
    assert all(note in done.stdout for note in status.notes) and len(status.notes) == 2
    assert done.stdout.endswith("\nfit: every line can be learned\n")


@pytest.mark.parametrize("kind", ["folder", "pattern", "gzip", "parquet", "several"])
def test_a_file_may_be_whatever_a_job_may_name(
    tmp_path: Path, model_folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    first = write(tmp_path / "data", GOOD, name="a.jsonl")
    second = tmp_path / "data" / "b.jsonl"
    match kind:
        case "gzip":
            second = second.with_suffix(".jsonl.gz")
            second.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
        case "parquet":
            second = second.with_suffix(".parquet")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), second)
        case _:
            write(tmp_path / "data", GOOD, name="b.jsonl")
    names: Sequence[object] = {"pattern": [first.parent / "*.json*"], "several": [second, first]}.get(
        kind, [first.parent]
    )
    status, output, _ = look_here(capsys, *names, "--model", model_folder)
    assert status == FIT
    text = "⟦<|user|>⟧one⟦<|end|>⟧⟦<|assistant|>⟧«two⟦<|end|>⟧»"
    assert output.count(text) == 2
    assert output.index(f"{first}, line 1: ") < output.index(f"{second}, line 1: ")
    assert "2 lines, 2 sequences" in output


REFUSED: list[tuple[object, Reason]] = [
    ({"question": "a", "answer": "b"}, Reason.NO_FORMAT),
    ({"messages": [TURNS[0], {"role": "assistant", "content": "LAST"}]}, Reason.VOCABULARY),
    (b'{"messages": "' + b"x" * (16 << 20) + b'"}', Reason.TOO_LARGE),
    (b'{"messages": "\xff"}', Reason.NOT_UTF8),
    (b"{", Reason.NOT_JSON),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', Reason.SURROGATE),
    ({"messages": [5]}, Reason.FIELD),
    ({"messages": [TURNS[0] | {"wieght": 0}, TURNS[1]]}, Reason.UNKNOWN_FIELD),
    ({"messages": TURNS[:2], "images": ["x"]}, Reason.UNSUPPORTED),
    ({"messages": [TURNS[0], {"role": "assistant", "content": ""}]}, Reason.EMPTY_ANSWER),
    ({"messages": TURNS[:1]}, Reason.NOTHING_TO_LEARN),
    ({"messages": [{"role": "system", "content": "x"}, *TURNS[:2]]}, Reason.TEMPLATE),
    ({"messages": [TURNS[0], {"role": "assistant", "content": "a" * 99}]}, Reason.TOO_LONG),
]


def test_each_refused_line_is_named(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    tokenizer = Tokenizer(model_folder)
    beyond = tokenizer.size - 1
    (folder / "config.json").write_text(json.dumps({"vocab_size": beyond}))
    path = write(tmp_path, *(row for row, _ in REFUSED), GOOD)
    path.write_bytes(path.read_bytes().replace(b"LAST", tokenizer.pieces.bytes_of(beyond)))
    done = look(path, "--model", folder, "--max-length", 64)
    assert done.returncode == UNFIT
    assert re.findall(r"(?m)^line (\d+): refused, (\w+): .", done.stdout) == [
        (str(n), reason) for n, (_, reason) in enumerate(REFUSED, 1)
    ]
    assert {reason for _, reason in REFUSED} == set(Reason) - {Reason.UNREADABLE}
    assert f"13 lines ({', '.join(f'{reason} 1' for _, reason in REFUSED)})" in done.stdout
    assert "1 over the limit of 64" in done.stdout
    assert "1 line, 1 sequence" in done.stdout
    assert done.stdout.endswith("not fit: dataset.onInvalid Fail would refuse it at line 1\n")


def test_an_answer_is_refused_alone(tmp_path: Path, forgetful: Path) -> None:
    long = [*TURNS[:2], {"role": "user", "content": "a" * 60}, TURNS[3]]
    path = write(tmp_path, {"messages": long})
    done = look(path, "--model", forgetful, "--max-length", 64, "--lines", 0, "--line", 1)
    assert done.returncode == UNFIT
    assert "line 1, turn 0: " in done.stdout
    assert "«two⟦<|end|>⟧»" in done.stdout
    assert re.search(r"line 1: an answer refused, TooManyTokens: turn 1 has \d+ tokens", done.stdout)
    assert "0 lines and 1 single answer (TooManyTokens 1)" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"{\n]\n", "none of its 2 lines can be used (NotJson 2)"),
        (b"\x1f\x8b\x08cut off", "is damaged or cut off (gzip"),
    ],
)
def test_data_without_a_usable_line_is_unfit(
    tmp_path: Path, model_folder: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    status, output, errors = look_here(capsys, path, "--model", model_folder)
    assert (status, errors) == (UNFIT, "")
    assert output.splitlines()[-1].startswith("not fit: ")
    assert words in output.splitlines()[-1]
