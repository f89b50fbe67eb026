"""Files of a data set: kinds, folders, patterns, links; and that none of them is held in memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_rows import GOOD, line_of, load, reader_of, write

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data import files as files_module
from coserve_agent.data.dataset import Dataset
from coserve_agent.data.files import MAX_LINE_BYTES, find
from coserve_agent.data.problems import Reason
from coserve_agent.errors import DatasetError
from coserve_api.job import DatasetFormat, OnInvalid
from coserve_api.job_status import FailedReason

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")


def texts(*words: str) -> list[dict[str, Any]]:
    return [{"text": word} for word in words]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows, **options), path, row_group_size=2)
    return path


def read(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(sample.tokens) for sample in dataset.samples(dataset.ids)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.jsonl with three rows, a.jsonl.gz with two, c.parquet with three; and what is none of these."""
    write(tmp_path, *texts("one", "two"), b"", {"text": "three"}, name="b.jsonl")
    plain = write(tmp_path, *texts("four", "five"), name="plain")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    write_parquet(tmp_path / "c.parquet", texts("six", "seven", "the"))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.jsonl").write_text("no JSON")
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", {"text": "fox"}, name="d.jsonl")
    return tmp_path


def test_all_files_of_a_folder_in_the_order_of_their_names(folder: Path, tokenizer: Tokenizer) -> None:
    files, left = find(folder, folder)
    assert ([file.path.name for file in files], left) == (["a.jsonl.gz", "b.jsonl", "c.parquet"], ["README.md"])
    dataset = Dataset(files, reader_of(tokenizer), OnInvalid.FAIL)
    assert read(dataset, tokenizer) == ["four", "five", "one", "two", "three", "six", "seven", "the"]
    assert dataset.ids == (1, 2, 3, 4, 6, 7, 8, 9), "lines are counted through, blank ones too"
    assert [(file.path.name, number) for file, number in map(dataset.where, (2, 3, 6, 9))] == [
        ("a.jsonl.gz", 2), ("b.jsonl", 1), ("b.jsonl", 4), ("c.parquet", 3),
    ]  # fmt: skip
    assert [(first, last) for _, first, last in dataset.spans()] == [(1, 2), (3, 6), (7, 9)]
    assert [tokenizer.decode(s.tokens) for s in dataset.samples((9, 1, 3, 2))] == ["the", "four", "one", "five"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("?.jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("*/*.jsonl", ["d.jsonl"]),
        ("**/*.jsonl", ["d.jsonl"]),
        ("*", ["README.md", "a.jsonl.gz", "b.jsonl", "c.parquet"]),
    ],
)
def test_a_pattern_is_a_shells(folder: Path, pattern: str, names: list[str]) -> None:
    files, left = find(folder / pattern, folder)
    assert ([file.path.name for file in files], left) == (names, [])


def test_a_path_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for path, names in (("*.jsonl", ["b.jsonl"]), ("deeper/d.*", ["deeper/d.jsonl"]), ("b.jsonl", ["b.jsonl"])):
        assert [str(file.path) for file in find(Path(path), Path())[0]] == names


def test_an_error_names_the_file_and_its_own_line(folder: Path, tokenizer: Tokenizer) -> None:
    write(folder, {"text": "one"}, {"text": 5}, name="b.jsonl")
    with pytest.raises(DatasetError, match=r"b.jsonl, line 2: text is a number; it must be") as caught:
        Dataset(find(folder, folder)[0], reader_of(tokenizer), OnInvalid.FAIL)
    assert caught.value.line == 2
    skipping = Dataset(find(folder, folder)[0], reader_of(tokenizer), OnInvalid.SKIP)
    (first,) = skipping.problems.first
    assert (Path(first.file).name, first.line) == ("b.jsonl", 2)


def test_what_a_file_is_its_bytes_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = write(tmp_path, *texts("one", "two"), name="train.json")
    packed = tmp_path / "train"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    columns = write_parquet(tmp_path / "columns.jsonl", texts("one", "two"))
    assert [read(load(path, tokenizer), tokenizer) for path in (plain, packed, columns)] == [["one", "two"]] * 3


# ---- Parquet ----


def test_rows_of_parquet_are_those_of_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A struct's null fields are not there, a missing number is none; what is no JSON stands in nobody's way."""
    rows = [
        {**GOOD, "score": float("nan"), "when": None, "image": None},
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "x", "weight": 0}], "score": 1.5},
    ]
    path = write_parquet(tmp_path / "x.parquet", rows)
    made = load(path, tokenizer)
    same = load(write(tmp_path, GOOD, rows[1]), tokenizer)
    assert made.samples(made.ids) == same.samples(same.ids)
    assert made.problems.unknown_fields == {"score": 1}


def test_other_types_of_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import datetime  # noqa: PLC0415
    import decimal  # noqa: PLC0415

    when, price = datetime.datetime(2026, 1, 1), decimal.Decimal("1.5")
    path = write_parquet(tmp_path / "x.parquet", [{"text": b"one", "when": when, "price": price, "raw": b"\xff"}])
    assert read(load(path, tokenizer), tokenizer) == ["one"], "old writers have bytes for text"
    for value in (when, price, b"\xff"):
        with pytest.raises(DatasetError, match=r"text is an object; it must be a string"):
            load(write_parquet(tmp_path / "y.parquet", [{"text": value}]), tokenizer)


def test_a_damaged_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    packed = gzip.compress(b'{"text": "one"}\n' * 5000)
    good = write_parquet(tmp_path / "good.parquet", texts(*["one two three"] * 500)).read_bytes()
    broken = bytearray(packed)
    broken[40] ^= 255
    for content in (packed[:-20], bytes(broken), good[:-20], good[:200] + b"\0" * 20 + good[220:]):
        path = tmp_path / "damaged"
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"damaged: is damaged or cut off .*; copy it again") as caught:
            load(path, tokenizer)
        assert caught.value.reason is FailedReason.INVALID_DATASET


@pytest.mark.parametrize("name", ["a.jsonl.gz", "c.parquet"])
def test_a_file_that_has_no_room_unpacked_says_so(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """/dev/full takes nothing, as a full disk does."""
    words = f"{name}: takes more room unpacked than .* has; write it as plain .jsonl"
    with Path("/dev/full").open("w+b", buffering=0) as full, pytest.raises(DatasetError, match=words):
        monkeypatch.setattr(files_module.tempfile, "TemporaryFile", lambda: full)
        load(folder / name, tokenizer)


def test_pyarrow_is_imported_where_a_parquet_file_is_read(folder: Path, model_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from coserve_agent.data.dataset import Dataset;"
        "from coserve_agent.data.files import find; from coserve_agent.data.reader import Reader;"
        "from coserve_agent.data.rendering import Renderer; from coserve_agent.chat.tokenizer import Tokenizer;"
        "from coserve_api.job import DatasetFormat, Learn, OnInvalid; name, model = map(Path, sys.argv[1:]); "
        "reader = Reader(Renderer(Tokenizer(model), (3,)), DatasetFormat.AUTO, Learn.ALL, 64, 320);"
        "Dataset(find(name, name.parent)[0], reader, OnInvalid.FAIL);"
        "print(*(one in sys.modules for one in ('pyarrow', 'torch')))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, folder / name, model_folder], capture_output=True, text=True, check=True
        ).stdout.split()
        for name in ("b.jsonl", "c.parquet")
    ]
    assert said == [["False", "False"], ["True", "False"]]


def test_an_image_without_pyarrow_says_so(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"c.parquet: is a Parquet file, and this image has no pyarrow"):
        load(folder / "c.parquet", tokenizer)


# ---- links, and what is no file ----


def test_a_link_stays_in_the_volume(tmp_path: Path) -> None:
    root, other = tmp_path / "volume", tmp_path / "secret"
    for one in (root, other):
        one.mkdir()
        write(one, {"text": "one"})
    (root / "inside.jsonl").symlink_to("data.jsonl")
    (root / "outside.jsonl").symlink_to(other / "data.jsonl")
    (root / "beside").symlink_to(other)
    (root / "environ.jsonl").symlink_to("/proc/self/environ")
    assert find(root / "inside.jsonl", root)[0][0].path == root / "inside.jsonl"
    for name in ("outside.jsonl", "beside", "beside/data.jsonl", "b*/data.jsonl", "environ.jsonl", "e*", "*.jsonl"):
        with pytest.raises(DatasetError, match="lies outside of the volume") as caught:
            find(root / name, root)
        assert caught.value.reason is FailedReason.DATASET_NOT_FOUND


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for name, words in (("pipe", "no regular file"), ("circle", "no such file"), ("*.jsonl", "matches no file")):
        with pytest.raises(DatasetError, match=words):
            find(tmp_path / name, tmp_path)


# ---- lines ----


def test_a_line_over_the_limit_is_a_line_that_cannot_be_used(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_LINE_BYTES", 100)
    exact = b'{"text": "one", "x": "' + b"y" * (100 - 24) + b'"}'
    assert len(exact) == 100
    path = write(tmp_path, {"text": "one"}, b"[" * 101, b" " * 350, exact, b"{" * 1000, {"text": "two"})
    with pytest.raises(DatasetError, match=r"line 2: is longer than \d+ bytes; split the row"):
        load(path, tokenizer)
    for content in (path.read_bytes(), path.read_bytes().removesuffix(b"\n"), gzip.compress(path.read_bytes())):
        path.write_bytes(content)
        dataset = load(path, tokenizer, OnInvalid.SKIP)
        assert dataset.ids == (1, 4, 6)
        assert read(dataset, tokenizer) == ["one", "one", "two"]
        assert dataset.problems.by_reason == {Reason.TOO_LARGE: 3}


def test_blank_lines_and_marks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"text": "one"}\r\n\r\n \t\n\xef\xbb\xbf{"text": "two"}')
    assert load(path, tokenizer).ids == (2, 5)
    path.write_bytes('{"text": "one"}\n'.encode("utf-16"))
    with pytest.raises(DatasetError, match=r"line 1: is not UTF-8 \(byte 1\); save the file as UTF-8"):
        load(path, tokenizer)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_neither_with_the_file_nor_with_its_longest_line(
    tmp_path: Path, tokenizer: Tokenizer, packed: bool
) -> None:
    """A file of 100 MiB in few lines, one of them of 60 MiB, is read with less than twice the longest usable line."""

    def content() -> Iterator[bytes]:
        yield line_of({"text": "one"}) + b"\n"
        for _ in range(60):
            yield b"[" * (1 << 20)
        yield b"\n"
        for _ in range(40):
            yield line_of({"text": "two", "x": "y" * (1 << 20)}) + b"\n"

    path = tmp_path / "data.jsonl"
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        for part in content():
            file.write(part)
    tracemalloc.start()
    try:
        dataset = load(path, tokenizer, OnInvalid.SKIP, format=DatasetFormat.TEXT)
        assert len(dataset.samples(dataset.ids[-5:])) == 5
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(dataset.ids) == 41
    assert peak < 2 * MAX_LINE_BYTES + (4 << 20), peak


def test_a_row_is_read_as_it_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in texts("one", "two"))))
    dataset = load(path, tokenizer)
    path.unlink()
    assert read(dataset, tokenizer) == ["one", "two"], "a copy stays until the end"
