"""A wrong argument or name is said in one line, with an exit status of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_rows import GOOD, write
from previewing import WRONG, look_here


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["FILE"]),
        (["--max-length", "7"], ["--max-length", "'7'", "8"]),
        (["--format", "csv"], ["--format", "'csv'", "sharegpt"]),
        (["--learn", "Some"], ["--learn", "'All', 'Last'"]),
        (["--date", "2026-02-30"], ["--date", "'2026-02-30'", "calendar"]),
        (["--lines", "-1"], ["--lines", "-1"]),
        (["--line", "0"], ["--line", "'0'"]),
        (["--epochs", "many"], ["--epochs", "integer"]),
        (["--template-variables", "{"], ["--template-variables", "no JSON"]),
        (["--template-variables", "[1]"], ["--template-variables", "object"]),
        (["--template-variables", '{"a": NaN}'], ["--template-variables", "NaN"]),
        (["pvc://data/x.jsonl"], ["FILE", "'pvc://data/x.jsonl' is a URI", "path"]),
        (["--verbose"], ["--verbose"]),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = look_here(capsys, *([*arguments, "data.jsonl", "--model", "x"] if arguments else []))
    assert status == WRONG
    *_, line = errors.splitlines()
    assert line.startswith("Error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}", "--model", "Qwen/Qwen3-0.6B"], "--model is 'Qwen/Qwen3-0.6B': no such folder"),
        (["{data}", "--model", "{folder}"], "tokenizer.json: no such file"),
        (["{data}x", "--model", "{model}"], "data.jsonlx: no such file"),
        (["{folder}/*.csv", "--model", "{model}"], "*.csv: matches no file"),
        (["{model}", "--model", "{model}"], "is a folder without .jsonl"),
        (
            ["{data}", "--model", "{model}", "--template-variables", '{{"thinking": 1}}'],
            "templateVariables has 'thinking'",
        ),
        (["{data}", "--model", "{model}", "--line", "2"], "--line 2: there is no such line"),
    ],
)
def test_wrong_names_are_said_in_one_line(
    tmp_path: Path, model_folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, GOOD)
    status, _, errors = look_here(
        capsys, *(one.format(data=path, folder=tmp_path, model=model_folder) for one in arguments)
    )
    assert status == WRONG
    (line,) = errors.splitlines()
    assert line.startswith("Error: ") and words in line
