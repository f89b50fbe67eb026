"""Values as they are typed, within the bounds of the custom resources' fields."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, cast

import click
from pydantic import TypeAdapter, ValidationError

from coserve_api.common import ModelName
from coserve_api.quantities import Memory, quantity_bytes


class Checked(click.ParamType[Any]):
    """What a field of that type takes."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name = name
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.checked(value, param, ctx) if isinstance(value, str) else value

    def checked(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` within its bounds; raises click.BadParameter."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            message = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
            shown = message if repr(value) in message else f"{value!r}: {message[:1].lower()}{message[1:]}"
            self.fail(shown, param, ctx)


class MemorySize(Checked):
    """A quantity such as 1.5Gi, as bytes."""

    def __init__(self) -> None:
        super().__init__("quantity", Memory)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        checked = super().convert(value, param, ctx)
        return quantity_bytes(checked) if isinstance(checked, str) else checked


class Named(click.ParamType[tuple[str, Path]]):
    """NAME=FOLDER."""

    name = "name=folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if not isinstance(value, str):
            return cast(tuple[str, Path], value)
        name, equals, folder = value.partition("=")
        if not (name and equals and folder):
            self.fail(f"{value!r}: give NAME=FOLDER, such as sql=adapters/sql", param, ctx)
        return Checked("name", ModelName).convert(name, param, ctx), Path(folder)


def names(kind: type[Enum]) -> click.Choice[str]:
    """One of an enumeration's values."""
    return click.Choice([str(one.value) for one in kind])
