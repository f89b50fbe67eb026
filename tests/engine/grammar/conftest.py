"""The tokenizer of the tests' small models, and what compiles grammars over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from grammars import compiler
from small_models import PLAIN_TEMPLATE, write_tokenizer

from coserve_engine.grammar.compiler import Compiler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, PLAIN_TEMPLATE)
    return path


@pytest.fixture
def of(folder: Path) -> Compiler:
    return compiler(folder)
