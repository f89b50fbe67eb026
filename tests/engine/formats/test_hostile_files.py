"""Adapters of somebody who means harm: refused with the file's name, and the engine serves on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coserve_engine.errors import CheckpointError
from coserve_engine.formats.folders import verify_folder
from coserve_engine.formats.opened import TEXT_BYTES, check_beneath, opened, read_text
from coserve_engine.formats.patterns import PatternError, matches, parsed
from coserve_engine.formats.tensor_file import HEADER_BYTES, load_tensors
from coserve_engine.messages import AdapterFailed, AdapterVersion, AddRequest, LoadAdapter, SamplingParams

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VERSION = AdapterVersion("a", 1)


def refusal(d: Any, folder: Path) -> str:
    """Why the engine does not load it; it serves afterwards."""
    d.submit(LoadAdapter(VERSION, str(folder)))
    d.submit(AddRequest("r", (5, 6, 7), SamplingParams(2, ignore_eos=True), 0.0))
    message = str(d.run().one(AdapterFailed).message)
    assert len(d.tokens()["r"]) == 2
    assert str(folder) in message
    return message


def tensors_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHT_FILES = {
    "empty": b"",
    "short": b"\x01\x00",
    "length of everything": tensors_of({}, length=2**64 - 1),
    "length of more than the file": tensors_of({}, length=10**6),
    "deep": tensors_of(b'{"a":' + b"[" * 100_000),
    "no object": tensors_of([1]),
    "overlap": tensors_of({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 0, 4)}, bytes(4)),
    "hole": tensors_of({"a": tensor("F32", [1], 4, 8)}, bytes(8)),
    "beyond the end": tensors_of({"a": tensor("F32", [9], 0, 36)}, bytes(4)),
    "a shape that overflows": tensors_of({"a": tensor("F32", [2**62, 4], 0, 0)}),
    "a shape without values": tensors_of({Q0: tensor("F32", [0, 2**60], 0, 0)}),
    "below zero": tensors_of({"a": tensor("F32", [-1], 0, 4)}, bytes(4)),
    "four bits": tensors_of(
        {Q0: tensor("F4", [6, 64], 0, 192), Q0.replace("_A", "_B"): tensor("F4", [64, 6], 192, 384)}, bytes(384)
    ),
    "an exponent alone": tensors_of(
        {Q0: tensor("F8_E8M0", [6, 64], 0, 384), Q0.replace("_A", "_B"): tensor("F8_E8M0", [64, 6], 384, 768)},
        bytes(768),
    ),
    "a name that is no text": tensors_of(
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)
    ),
}


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_weights_that_are_no_weights(driver: Any, folder: Path, name: str) -> None:
    (folder / WEIGHTS).write_bytes(WEIGHT_FILES[name])
    refusal(driver(), folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_anywhere_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(tensors_of({"a": tensor("F32", [2, 2], 0, 16), "b": tensor("BF16", [3], 16, 22)}, bytes(22)))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(raw)
    try:
        load_tensors(tmp_path, "x", 100)
    except ValueError as error:
        assert str(error)


def test_a_header_and_a_file_beyond_their_bounds_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1))
        file.truncate(HEADER_BYTES + 100)
    with pytest.raises(ValueError, match=f"a header of {HEADER_BYTES + 1} bytes"):
        load_tensors(tmp_path, "x", 10**9)
    with (tmp_path / "x").open("wb") as file:
        file.write(tensors_of({}))
        file.truncate(2**40)
    with pytest.raises(ValueError, match="at most 1000 numbers have a place"):
        load_tensors(tmp_path, "x", 1000)


def test_values_that_overflow_harm_nobody_else(driver: Any, folder: Path) -> None:
    tensors = {name: torch.full_like(value, 1e38) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    d, other = driver(), driver()
    d.submit(LoadAdapter(VERSION, str(folder)))
    d.submit(AddRequest("bad", (5, 6, 7), SamplingParams(3, ignore_eos=True), 0.0, VERSION))
    for each in (d, other):
        each.submit(AddRequest("r", (5, 6, 7), SamplingParams(4, ignore_eos=True), 0.0))
        each.run()
    assert d.tokens()["r"] == other.tokens()["r"]


# ---- configurations ----

EVIL = r"(([a-z0-9_.])+)+X"


def test_a_pattern_that_python_would_follow_for_ever(driver: Any, folder: Path) -> None:
    path = folder / CONFIG
    facts = json.loads(path.read_text()) | {"rank_pattern": {EVIL: 3}, "alpha_pattern": {"(.*)*(.*)*Y": 2}}
    path.write_text(json.dumps(facts))
    d = driver()
    d.submit(LoadAdapter(VERSION, str(folder)))
    assert not d.run().of(AdapterFailed), "it matches nothing, and that is found out at once"


@pytest.mark.parametrize("pattern", (r"(a)\1", "(?=a)b", "(?i:a)", "(?>a*)b", r"a\b", "x" * 600, "(?i)a", "("))
def test_a_pattern_that_is_not_followed(driver: Any, folder: Path, pattern: str) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {pattern: 3}}))
    assert "rank_pattern has " in refusal(driver(), folder)


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "^", "$", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{0}", "{3,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(pattern=PATTERNS, text=st.text("ab.1", max_size=6))
def test_a_pattern_means_what_it_means_to_python(pattern: str, text: str) -> None:
    try:
        parsed(pattern)
    except PatternError:
        return
    assert matches(pattern, text) == (re.fullmatch(pattern, text) is not None)


def test_many_rounds_end() -> None:
    assert not matches("((a{9999}){9999}){9999}", "a" * 30)
    assert matches("((a?){9999}){9999}", "a" * 30)
    assert matches("(a*)*", "")


def test_a_configuration_of_many_megabytes(driver: Any, folder: Path) -> None:
    with (folder / CONFIG).open("ab") as file:
        file.truncate(TEXT_BYTES + 1)
    assert f"is longer than {TEXT_BYTES} bytes" in refusal(driver(), folder)


# ---- what is no file ----


@pytest.mark.parametrize("name", (CONFIG, WEIGHTS))
@pytest.mark.parametrize("kind", ("link", "pipe", "folder", "device"))
def test_a_file_that_is_none(driver: Any, folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.rename(folder.parent / name)
    if kind == "link":
        path.symlink_to(folder.parent / name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    message = refusal(driver(), folder)
    assert ("is a link" if path.is_symlink() else "is no regular file") in message


def test_a_folder_that_is_a_link(driver: Any, folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert "is a link, and none is followed here" in refusal(driver(), link)


def sealed(folder: Path) -> str:
    files = {one.name: {"sha256": hashlib.sha256(one.read_bytes()).hexdigest()} for one in folder.iterdir()}
    manifest = json.dumps({"version": 1, "files": files})
    (folder / "manifest.json").write_text(manifest)
    return hashlib.sha256(manifest.encode()).hexdigest()


def test_a_folder_behind_a_link_is_not_the_one_that_was_published(folder: Path, tmp_path: Path) -> None:
    digest = sealed(folder)
    root = tmp_path / "root"
    (root / "adapters").mkdir(parents=True)
    shutil.copytree(folder, root / "adapters" / "v1")
    assert verify_folder(root / "adapters" / "v1", digest, root) == digest
    (root / "adapters").rename(tmp_path / "elsewhere")
    (root / "adapters").symlink_to(tmp_path / "elsewhere")
    assert verify_folder(root / "adapters" / "v1", digest) == digest, "without a root nobody looks"
    with pytest.raises(CheckpointError, match="is a link"):
        verify_folder(root / "adapters" / "v1", digest, root)
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "elsewhere")
    assert verify_folder(linked / "v1", digest, linked) == digest, "the root itself is the operator's"
    with pytest.raises(OSError, match="is not below"):
        check_beneath(root, tmp_path)


@pytest.mark.parametrize("kind", ("link", "pipe"))
def test_a_file_of_the_manifest_that_is_none(folder: Path, kind: str) -> None:
    digest = sealed(folder)
    path = folder / WEIGHTS
    path.rename(folder.parent / WEIGHTS)
    if kind == "link":
        path.symlink_to(folder.parent / WEIGHTS)
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        verify_folder(folder, digest)


@pytest.mark.parametrize("content", ("[" * 100_000, '{"files": {"../x": {"sha256": ""}}}', '{"files": [1]}', "{", ""))
def test_a_manifest_that_is_none(folder: Path, content: str) -> None:
    (folder.parent / "x").write_text("")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest.json|x: named"):
        verify_folder(folder)


def test_a_name_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("../secret", "/etc/hostname", "..", ".", ""):
        with pytest.raises(OSError, match=r"is no name|no regular file|directory"), opened(tmp_path / "folder", name):
            pass
    assert read_text(tmp_path, "secret") == "x"
