"""What an answer is made of, in its order: a text read piece by piece gives these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thought:
    """A part of what the model thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """A part of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """Calls of an answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of a call's arguments, as the model wrote them: JSON, byte for byte."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Its arguments are whole."""

    index: int


Event = Thought | Said | CallBegun | Arguments | CallEnded
