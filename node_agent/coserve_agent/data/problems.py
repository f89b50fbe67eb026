"""Why lines cannot be used, counted by reason: a row that is left out is never left out in silence."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from coserve_agent.errors import AgentError

FIRST = 10
"""Refusals that are kept with all they say."""
NAMES = 32
"""Unknown fields that are counted by name; what comes later counts as OTHER_NAMES."""
OTHER_NAMES = "(other names)"
_LONGEST_NAME = 63
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,62}")


def is_name(text: str) -> bool:
    """Whether a field's name looks like one, and not like content."""
    return _NAME.fullmatch(text) is not None


class Reason(StrEnum):
    """Why a line, or one of its turns, cannot be used: a few words to count by."""

    TOO_LARGE = "LineTooLarge"
    NOT_UTF8 = "NotUtf8"
    NOT_JSON = "NotJson"
    SURROGATE = "HalfCharacter"
    NO_FORMAT = "UnknownFormat"
    FIELD = "InvalidField"
    UNKNOWN_FIELD = "UnknownField"
    UNSUPPORTED = "UnsupportedField"
    EMPTY_ANSWER = "EmptyAnswer"
    NOTHING_TO_LEARN = "NothingToLearn"
    TEMPLATE = "ChatTemplate"
    TOO_LONG = "TooManyTokens"
    VOCABULARY = "TokenOutsideVocabulary"
    UNREADABLE = "Unreadable"


class LineError(AgentError):
    """What is wrong with one line, and the remedy."""

    def __init__(self, reason: Reason, message: str, public: str | None = None) -> None:
        super().__init__(message, public)
        self.reason = reason


@dataclass(frozen=True)
class Refusal:
    """A line that is left out; `line` counts from 1 in `file`; `message` holds none of its content."""

    file: str
    line: int
    reason: Reason
    message: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.message}"


@dataclass
class Problems:
    """What is left out of a data set: `lines` whole, `turns` of lines whose other turns are used; fields of rows that
    mean nothing here, by name; files that are not read.
    """

    lines: int = 0
    turns: int = 0
    by_reason: Counter[Reason] = field(default_factory=Counter)
    first: list[Refusal] = field(default_factory=list)
    unknown_fields: Counter[str] = field(default_factory=Counter)
    unended: int = 0
    """Samples whose last token ends no answer when it is served."""

    def add_line(self, refusal: Refusal) -> None:
        self.lines += 1
        self._add(refusal)

    def add_turn(self, refusal: Refusal) -> None:
        self.turns += 1
        self._add(refusal)

    def add_fields(self, names: tuple[str, ...]) -> None:
        for name in names:
            shown = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
            known = shown in self.unknown_fields or len(self.unknown_fields) < NAMES
            self.unknown_fields[shown if known else OTHER_NAMES] += 1

    def __add__(self, other: Problems) -> Problems:
        """Both together, these first."""
        return Problems(
            self.lines + other.lines,
            self.turns + other.turns,
            self.by_reason + other.by_reason,
            [*self.first, *other.first][:FIRST],
            self.unknown_fields + other.unknown_fields,
            self.unended + other.unended,
        )

    def _add(self, refusal: Refusal) -> None:
        self.by_reason[refusal.reason] += 1
        if len(self.first) < FIRST:
            self.first.append(refusal)
