"""What a form in which calls are written has to say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coserve_agent.tools.reader import Reader, Steps


@dataclass(frozen=True)
class Marker:
    """A marker, as the tokenizer has it: a token of its own where it has one."""

    text: str


@dataclass(frozen=True)
class Schema:
    """The arguments of a function."""


Part = str | Marker | Schema
"""Of a text that a grammar allows."""


@dataclass(frozen=True)
class Written:
    """How one call of a function, or several, stand in a text. `between` is None where one call alone may."""

    call: tuple[Part, ...]
    opening: tuple[Part, ...] = ()
    between: tuple[Part, ...] | None = ()
    closing: tuple[Part, ...] = ()


class Format(Protocol):
    """One form."""

    @property
    def markers(self) -> tuple[str, ...]:
        """What calls begin with, as it looks in a text."""

    @property
    def bare(self) -> bool:
        """Whether a call may also begin without, at the start of an answer and behind another call."""

    def read(self, reader: Reader) -> Steps[None]:
        """Past the calls that a marker begins. Raises Malformed."""

    def written(self, name: str) -> Written:
        """What calls of the function `name` look like."""
