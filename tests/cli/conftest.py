"""A small random model, and `coserve` as a process: its output, and what Ctrl-C does to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_programs import Cli, running_cli
from small_models import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with running_cli(tmp_path) as made:
        yield made
