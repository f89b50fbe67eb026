"""An adapter as PEFT saves it, and a copy of it to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft_folders import save_adapter


@pytest.fixture(scope="module")
def good(plain: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(plain, tmp_path_factory.mktemp("peft"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))
