"""A small model, and engines on it with room for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_driver import Driver
from grammars import ROOMY
from small_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def drive(folder: Path, driver: Callable[..., Driver]) -> Callable[..., Driver]:
    return lambda **settings: driver(str(folder), **{**ROOMY, **settings})
