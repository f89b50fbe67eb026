"""Kernels that are wrong on purpose: a test must see it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any


def mutant(module: ModuleType, folder: Path, old: str, new: str) -> Any:
    """`module` with `new` for `old` wherever its source has that."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert old in source
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
