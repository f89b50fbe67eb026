"""Wherever the writing of a folder is cut short, its name stands for the old folder or for the new one, whole."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine.errors import CheckpointError
from coserve_engine.formats import artifacts, folders
from coserve_engine.formats.artifacts import write_folder
from coserve_engine.formats.folders import restore_folder, verify_folder


class CrashError(BaseException):
    """The process ends here."""


@contextmanager
def crash_at(call: int) -> Iterator[list[str]]:
    """End the process at its `call`-th call that changes the disk; yields the calls so far."""
    calls: list[str] = []
    patch = pytest.MonkeyPatch()

    def guard(owner: Any, name: str) -> None:
        done: Callable[..., Any] = getattr(owner, name)

        def guarded(*args: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise CrashError(name)
            return done(*args, **named)

        patch.setattr(owner, name, guarded)

    for owner, names in (
        (Path, ("rename", "mkdir", "write_text", "write_bytes")),
        (os, ("fsync",)),
        (shutil, ("rmtree",)),
        (folders, ("_exchange",)),
    ):
        for name in names:
            guard(owner, name)
    try:
        yield calls
    finally:
        patch.undo()


def write(path: Path, text: str) -> str:
    return write_folder(path, {"text": text}, {"t.safetensors": {"x": torch.ones(3)}})


def text_after_a_crash(path: Path, call: int) -> str | None:
    """What `path` holds when writing "new" over "old" ended at `call`; None once nothing is left to end."""
    write(path, "old")
    try:
        with crash_at(call):
            write(path, "new")
    except CrashError:
        restore_folder(path)
        verify_folder(path)
        return (path / "text").read_text()
    return None


@pytest.mark.parametrize("exchanges", [True, False])
def test_old_or_new_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    found = []
    for call in range(1, 100):
        text = text_after_a_crash(tmp_path / f"a{call}", call)
        if text is None:
            break
        found.append(text)
    turn = found.index("new")
    assert found == ["old"] * turn + ["new"] * (len(found) - turn)
    assert turn >= 6
    assert verify_folder(tmp_path / f"a{call}")
    assert not list(tmp_path.glob(f".a{call}.*"))


def test_removing_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the old one removed before the new one has its name, there is a moment without any."""

    def remove_first(scratch: Path, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)

    monkeypatch.setattr(artifacts, "replace_folder", remove_first)
    with pytest.raises(CheckpointError, match="incomplete"):
        for call in range(1, 100):
            text_after_a_crash(tmp_path / f"a{call}", call)


def test_a_crash_is_mended_by_the_next_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for exchanges in (True, False):
        if not exchanges:
            monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
        for call in range(6, 20, 2):
            path = tmp_path / f"{exchanges}{call}" / "a"
            path.parent.mkdir()
            text_after_a_crash(path, call)
            assert write(path, "third") == verify_folder(path)
            assert [left.name for left in path.parent.iterdir()] == ["a"]


def test_two_names_are_exchanged_at_once(tmp_path: Path) -> None:
    """On this file system; elsewhere the slower way is taken."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if folders._exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        folders._exchange(tmp_path / "a", tmp_path / "none")


def test_every_folder_that_was_made_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint of an epoch survives a power loss only if its parents' entries do."""
    synced, sync = [], artifacts._sync

    def spy(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr(artifacts, "_sync", spy)
    write(tmp_path / "jobs" / "e1" / "c1", "text")
    assert synced[-3:] == [tmp_path / "jobs" / "e1", tmp_path / "jobs", tmp_path]
    write(tmp_path / "jobs" / "e1" / "c2", "text")
    assert synced[-1] == tmp_path / "jobs" / "e1"


def test_a_folder_that_does_not_fit_leaves_no_half_of_it(tmp_path: Path) -> None:
    """A bound on the size of files stands for a disk that is full."""
    path, tensors = tmp_path / "s1", {"a.safetensors": {"a": torch.zeros(100_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_folder(path, {"a.txt": "a"}, tensors)
        assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write_folder(path, {"a.txt": "a"}, tensors)
    verify_folder(path)
