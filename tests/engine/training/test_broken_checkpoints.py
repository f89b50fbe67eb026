"""A checkpoint that is corrupt or of another run is refused, by name, and the engine lives on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coserve_engine.config import LINEARS
from coserve_engine.errors import CheckpointError
from coserve_engine.formats import folders
from coserve_engine.formats.folders import verify_folder
from coserve_engine.messages import (
    AdapterExported,
    AddRequest,
    CheckpointDone,
    Continued,
    ExportAdapter,
    JobFailed,
    JobStarted,
    LoraSpec,
    SamplingParams,
    SaveCheckpoint,
    StartJob,
)
from coserve_engine.numerics import Numerics

FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json", "notes.txt")


@pytest.fixture(scope="module")
def saved(driver: Any, training: Any, start_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step, made once."""
    d = driver()
    folder = tmp_path_factory.mktemp("checkpoint") / "s1"
    d.submit(start_job(), *training(steps=1), SaveCheckpoint("job", 99, str(folder), {"notes.txt": "hello\n"}))
    done = d.run().one(CheckpointDone)
    assert done.sha256 == verify_folder(folder)
    assert {f.name for f in folder.iterdir()} == {*FILES, "manifest.json"}
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1
    file.write_bytes(data)


def refusal(d: Any, command: StartJob, code: str = "invalid_checkpoint") -> str:
    """Message with which the engine refuses to resume; it serves afterwards."""
    d.submit(command)
    d.submit(AddRequest("r", (5, 6, 7), SamplingParams(2, ignore_eos=True), 0.0))
    failed = d.run().one(JobFailed)
    assert failed.code == code
    assert len(d.tokens()["r"]) == 2
    assert d.engine.jobs == {}
    return str(failed.message)


def test_an_intact_one_is_accepted(driver: Any, start_job: Any, folder: Path) -> None:
    d = driver()
    d.submit(start_job(resume=str(folder)))
    started = d.run().one(JobStarted)
    assert (started.step, started.seq_no, started.files) == (1, 99, {"notes.txt": "hello\n"})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", (0, 17, -1))
def test_a_flipped_bit(driver: Any, start_job: Any, folder: Path, name: str, at: int) -> None:
    flip(folder / name, at)
    assert str(folder / name) in refusal(driver(), start_job(resume=str(folder)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000))
def test_a_flipped_bit_of_the_manifest_is_harmless_or_refused(folder: Path, at: int) -> None:
    manifest = folder / "manifest.json"
    before = manifest.read_bytes()
    sha256 = verify_folder(folder)
    flip(manifest, at)
    with pytest.raises(CheckpointError):
        verify_folder(folder, sha256)
    try:
        verify_folder(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    manifest.write_bytes(before)


@pytest.mark.parametrize("name", (*FILES, "manifest.json"))
def test_a_missing_file(driver: Any, start_job: Any, folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert str(folder / name) in refusal(driver(), start_job(resume=str(folder)))


def test_a_missing_folder(driver: Any, start_job: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(driver(), start_job(resume=str(tmp_path / "none")))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json and make the manifest agree."""
    file = folder / "state.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    agree(folder, file)


def agree(folder: Path, file: Path) -> None:
    """Have the manifest say what the file is."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name]["sha256"] = folders.digest(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("name", "value"), [("m", float("nan")), ("v", float("inf")), ("v", -1.0)])
def test_moments_that_no_step_leaves(driver: Any, start_job: Any, folder: Path, name: str, value: float) -> None:
    file = folder / "optimizer.safetensors"
    moments = load_file(file)
    moments[name][7] = value
    save_file(moments, file)
    agree(folder, file)
    assert "optimizer.safetensors: moments are" in refusal(driver(), start_job(resume=str(folder)))


@pytest.mark.parametrize("field", ("step", "seq_no", "updates", "lora", "numerics", "files"))
def test_a_state_without_a_field(driver: Any, start_job: Any, folder: Path, field: str) -> None:
    rewrite(folder, lambda facts: facts.pop(field))
    assert field in refusal(driver(), start_job(resume=str(folder)))


@pytest.mark.parametrize("field", ("step", "seq_no", "updates"))
@pytest.mark.parametrize("value", (-1, 2**64, float("inf"), float("nan"), [1], "x"))
def test_a_counter_that_no_step_leaves(driver: Any, start_job: Any, folder: Path, field: str, value: object) -> None:
    rewrite(folder, lambda facts: facts.update({field: value}))
    assert str(folder) in refusal(driver(), start_job(resume=str(folder)))


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 10**9},
        {"rank": -4},
        {"rank": 10**4000},
        {"rank": "4"},
        {"alpha": "8"},
        {"alpha": float("nan")},
        {"alpha": 10**400},
        {"targets": ["lm_head"]},
        {"targets": [{}]},
        {"targets": 3},
        {"use_rslora": "no"},
    ],
    ids=str,
)
def test_a_shape_that_no_job_has(driver: Any, folder: Path, lora: dict[str, Any]) -> None:
    """Taken over as it is by a job that says nothing of its own."""
    rewrite(folder, lambda facts: facts["lora"].update(lora))
    assert str(folder) in refusal(driver(), StartJob("job", Continued("/none"), 0, str(folder)))


@pytest.mark.parametrize("facts", ("[" * 100_000, "[]", "null", '{"lora": []}', '{"lora": {}}', "\x00\xff"))
def test_a_state_that_is_none(driver: Any, start_job: Any, folder: Path, facts: str) -> None:
    (folder / "state.json").write_text(facts, encoding="latin-1")
    agree(folder, folder / "state.json")
    assert str(folder) in refusal(driver(), start_job(resume=str(folder)))


@pytest.mark.parametrize("name", ("../secret", "/etc/hostname", "..", "", "linked", "pipe"))
def test_a_state_that_names_files_elsewhere(driver: Any, start_job: Any, folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("not to be read")
    (folder / "linked").symlink_to("../secret")
    os.mkfifo(folder / "pipe")
    rewrite(folder, lambda facts: facts.update(files=["notes.txt", name]))
    assert str(folder) in refusal(driver(), start_job(resume=str(folder)))


def test_another_rank(driver: Any, start_job: Any, folder: Path) -> None:
    message = refusal(driver(), start_job(rank=6, resume=str(folder)))
    assert "state.json" in message
    assert "rank=4" in message
    assert "rank=6" in message


def test_other_targets(driver: Any, folder: Path) -> None:
    spec = LoraSpec(4, 8.0, LINEARS[:3])
    assert "targets" in refusal(driver(), StartJob("job", spec, 0, str(folder)))


def test_other_numerics(driver: Any, start_job: Any, folder: Path) -> None:
    message = refusal(driver(numerics=Numerics(tile=32)), start_job(resume=str(folder)), "other_arithmetic")
    assert "'tile': 64" in message
    assert "'tile': 32" in message


@pytest.mark.parametrize("recorded", (True, False))
def test_another_dtype(driver: Any, start_job: Any, folder: Path, recorded: bool) -> None:
    """It would read: adapters, moments and their dtype are the same. Engines that recorded none knew float32 alone."""
    if not recorded:
        rewrite(folder, lambda facts: facts.pop("dtype"))
        same = driver()
        same.submit(start_job(resume=str(folder)))
        assert same.run().one(JobStarted).step == 1
    message = refusal(driver(dtype="bfloat16"), start_job(resume=str(folder)), "other_arithmetic")
    assert message.startswith(f"{folder / 'state.json'}: dtype is float32, and this engine's is bfloat16")
    assert "set engine.dtype of the endpoint to float32" in message


def test_the_remedy_for_another_dtype_is_one(driver: Any, folder: Path) -> None:
    """The folder of a checkpoint is an adapter that a new job can go on from, in any dtype."""
    d = driver(dtype="bfloat16")
    d.submit(StartJob("job", Continued(str(folder)), 0))
    assert d.run().one(JobStarted).step == 0


def test_bfloat16_goes_on_in_bfloat16(driver: Any, start_job: Any, training: Any, tmp_path: Path) -> None:
    d = driver(dtype="bfloat16")
    d.submit(start_job(), *training(steps=1), SaveCheckpoint("job", 99, str(tmp_path / "s1")))
    d.run()
    again = driver(dtype="bfloat16")
    again.submit(start_job(resume=str(tmp_path / "s1")))
    assert again.run().one(JobStarted).step == 1
    message = refusal(driver(), start_job(resume=str(tmp_path / "s1")), "other_arithmetic")
    assert "dtype is bfloat16, and this engine's is float32" in message


# ---- writing ----


@pytest.mark.parametrize("kind", ("checkpoint", "adapter"))
def test_an_unwritable_store_fails_the_job_only(
    driver: Any, start_job: Any, training: Any, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    path = str(tmp_path / "file" / "s1")
    d = driver()
    write = SaveCheckpoint("job", 99, path) if kind == "checkpoint" else ExportAdapter("job", 99, path, "base")
    d.submit(start_job(), *training(steps=1), write)
    d.submit(AddRequest("r", (5, 6, 7), SamplingParams(2, ignore_eos=True), 0.0))
    failed = d.run().one(JobFailed)
    assert failed.code == "artifact_store"
    assert path in failed.message or str(tmp_path / "file") in failed.message
    assert len(d.tokens()["r"]) == 2
    assert d.engine.jobs == {}


def test_a_full_disk_fails_the_job_only(
    driver: Any, start_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    d = driver()
    d.submit(start_job(), SaveCheckpoint("job", 1, str(tmp_path / "s1")))
    failed = d.run().one(JobFailed)
    assert failed.code == "artifact_store"
    assert "No space left" in failed.message
    assert not (tmp_path / "s1").exists()


def test_a_folder_is_replaced_whole(driver: Any, start_job: Any, tmp_path: Path) -> None:
    d = driver()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    d.submit(start_job(), ExportAdapter("job", 1, str(tmp_path / "a"), "base", {"log.jsonl": "{}\n"}))
    done = d.run().one(AdapterExported)
    names = {f.name for f in (tmp_path / "a").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "manifest.json"}
    assert done.sha256 == verify_folder(tmp_path / "a")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
