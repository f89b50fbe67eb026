"""Checked access to the fields of a JSON object in a model folder: a wrong one is named with its file and its value."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from coserve_engine.errors import ModelFolderError

MAX_COUNT = (1 << 31) - 1


def is_finite_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that a float holds: float() of a larger integer would raise."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Fields:
    """The object `raw` of file `path`, found there under `prefix`; `defaults` stand for fields that are left out.

    Every method raises ModelFolderError for a field that is missing or has no usable value.
    """

    path: Path
    raw: Mapping[str, Any]
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The object that file `path` holds."""
        try:
            loaded: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelFolderError(
                f"{path}: no such file; the model must be a Hugging Face folder with config.json"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelFolderError(f"{path}: not readable as JSON ({error}); copy the model folder again") from None
        if not isinstance(loaded, dict):
            raise ModelFolderError(
                f"{path}: holds a {type(loaded).__name__}, not an object; copy the model folder again"
            )
        return cls(path, loaded)

    def refuse(self, name: str, remedy: str) -> NoReturn:
        """Raise for the value of `name`."""
        raise ModelFolderError(f"{self.path}: {self.prefix}{name} is {self.get(name)!r}; {remedy}")

    def get(self, name: str) -> Any:
        """The value of a field, as it is."""
        if name in self.raw:
            return self.raw[name]
        if name in self.defaults:
            return self.defaults[name]
        raise ModelFolderError(f"{self.path}: field '{self.prefix}{name}' is missing; copy the model folder again")

    def only(self, name: str, *allowed: object) -> None:
        """A field that may be left out or be one of `allowed`."""
        if name in self.raw and self.raw[name] not in allowed:
            self.refuse(name, f"only {' or '.join(map(repr, allowed))} is supported")

    def count(self, name: str, least: int = 1) -> int:
        """A whole number from `least` to MAX_COUNT."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
            self.refuse(name, f"it must be a whole number of at least {least} and at most {MAX_COUNT}")
        return int(value)

    def optional_count(self, name: str) -> int | None:
        """A whole number from 1 to MAX_COUNT, or null."""
        return None if self.get(name) is None else self.count(name)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if not is_finite_number(value) or value <= 0:
            self.refuse(name, "it must be a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            self.refuse(name, "it must be true or false")
        return bool(value)
