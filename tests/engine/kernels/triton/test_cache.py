"""Compiled kernels are kept where they may be, found where they are, and never end a start."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from triton import knobs
from triton.runtime.cache import get_cache_manager

from coserve_engine.kernels.triton import cache

KEY, OTHER = "ab" * 32, "cd" * 32
BOTH = {"k.cubin": "k.cubin", "k.json": "k.json"}
NOWHERE = "compiled kernels are kept in no folder that outlives this process"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's own cache is the other tests'."""
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "0")
    yield
    del knobs.cache.manager_class, knobs.compilation.store_binary_only


def compiled() -> dict[str, str] | None:
    """Put a kernel as Triton does."""
    manager = get_cache_manager(KEY)
    manager.put_group("k.json", {name: manager.put(name.encode(), name) for name in BOTH})
    return found()


def found() -> dict[str, str] | None:
    """By name, what the files hold."""
    group = get_cache_manager(KEY).get_group("k.json")
    return None if group is None else {name: Path(path).read_text() for name, path in group.items()}


def test_what_was_compiled_is_there_at_the_next_start(tmp_path: Path) -> None:
    kept = tmp_path / "a" / "b" / cache.OURS
    assert cache.keep(tmp_path / "a" / "b", None) == f"compiled kernels are kept in {kept}"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert found() is None
    assert compiled() == BOTH
    cache.keep(tmp_path / "a" / "b", None)
    assert found() == BOTH
    assert not list(kept.rglob(".*")), "no parts are left"


def test_an_image_brings_them_wherever_it_is_mounted(tmp_path: Path) -> None:
    cache.keep_all(tmp_path / "made")
    compiled()
    image = (tmp_path / "made").rename(tmp_path / "image")
    assert cache.keep(None, image) == f"{NOWHERE}, and come from {image}"
    before = sorted(image.rglob("*"))
    assert found() == BOTH
    get_cache_manager(OTHER).put(b"", "other.cubin")
    assert sorted(image.rglob("*")) == before
    assert cache.keep(None, tmp_path / "nowhere") == NOWHERE


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert cache.keep(tmp_path / "file", None) == NOWHERE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path / 'file'}" in record.getMessage()
    assert compiled() == BOTH, "this process has it all the same"


@pytest.mark.parametrize("mode", [0o707, 0o777])
def test_a_folder_in_which_others_could_put_code_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    folder = tmp_path / cache.OURS
    folder.mkdir()
    folder.chmod(mode)
    assert cache.keep(tmp_path, None) == NOWHERE
    assert f"with mode {mode:o}: others could put code there; remove it" in caplog.text
    assert compiled() == BOTH
    assert not list(folder.iterdir())


def test_the_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / cache.OURS).mkdir(mode=0o700)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert cache.keep(tmp_path, None) == NOWHERE


def test_the_folder_of_our_group_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a volume's fsGroup makes it."""
    folder = tmp_path / cache.OURS
    folder.mkdir()
    folder.chmod(0o2770)
    assert cache.keep(tmp_path, None) == f"compiled kernels are kept in {folder}"
    ours = os.getegid()
    monkeypatch.setattr(os, "getegid", lambda: ours + 1)
    assert cache.keep(tmp_path, None) == NOWHERE


def test_a_folder_that_becomes_full_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was kept is found, and the rest ends with the process."""
    kept = tmp_path / "kept"
    cache.keep(kept, None)
    compiled()
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if kept in self.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    other = get_cache_manager(OTHER)
    path = other.put(b"new", "other.cubin")
    assert (Path(path).read_bytes(), other.get_file("other.cubin")) == (b"new", path)
    assert kept not in Path(path).parents
    assert found() == BOTH
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device; make room there" in caplog.text
    assert not list(kept.rglob(".*"))
