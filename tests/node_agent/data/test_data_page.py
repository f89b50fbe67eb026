"""docs/data.md shows what is printed, and names every format and reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from previewing import UNFIT, look_here

from coserve_agent.data.formats import detect
from coserve_agent.data.problems import Reason
from coserve_api.job import DatasetFormat

ROOT = Path(__file__).parents[3]


def test_the_page_shows_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.search(r"(?s)<<'END'\n(.*?)END\n", page)
    printed = re.search(r"(?s)\nprints\n```\n(.*?)```\n", page)
    assert rows is not None and printed is not None
    path = tmp_path / "rows.jsonl"
    path.write_text(rows[1])
    status, output, _ = look_here(capsys, path, "--model", ROOT / "examples" / "base-model")
    assert (status, output.replace(str(path), "/tmp/rows.jsonl")) == (UNFIT, printed[1])


def test_the_page_lists_formats_in_the_order_of_detection() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^\| `([a-z-]+)` \| `(\{.*?\})`(?: \||,)", page)
    assert {name for name, _ in listed} == set(DatasetFormat) - {DatasetFormat.AUTO}
    together = {name: value for _, row in reversed(listed) for name, value in json.loads(row).items()}
    for name, row in listed:
        assert detect(json.loads(row)) == detect(together) == name
        together = {field: value for field, value in together.items() if field not in json.loads(row)}


def test_the_page_names_every_reason() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.split("| reason | |")[1].split("\n\n")[0]
    assert set(re.findall(r"\b[A-Z]\w+", " ".join(re.findall(r"(?m)^\| (.*?) \|", table)))) == set(Reason)
