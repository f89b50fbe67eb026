"""A text that is read while it grows. What reads it is a generator that stops where it needs more, so that each format
is written down as if the text were there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from typing import TypeVar

from coserve_agent.text.marks import unmarked
from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Event

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Stops wherever the text ends and more of it may come."""

_BLANK = re.compile(r"[ \t\r\n]*")


class Malformed(Exception):  # noqa: N818 (it is no error of anybody's)
    """The text is not what it began as."""


class Reader:
    """The text behind a marker, and the calls found in it so far.

    Args:
        at: where to begin.
        calls: how many the answer has had before.
        names: those that a call may have; None: any.
    """

    def __init__(self, text: str, at: int = 0, calls: int = 0, names: Collection[str] | None = None) -> None:
        self.text, self.at, self.ended = text, at, False
        self.events: list[Event] = []
        self.calls = calls
        self._names = names
        self._from: int | None = None
        """Where the arguments go on that are being read."""

    # ---- the text ----

    def peek(self) -> Steps[str]:
        """The next character; "" at the end of all."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def blank(self) -> Steps[None]:
        """Past white space."""
        while (yield from self.peek()) in (" ", "\t", "\r", "\n"):
            found = _BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at

    def follows(self, literal: str) -> Steps[bool]:
        """Whether `literal` is next; past it if so."""
        while True:
            if self.text.startswith(literal, self.at):
                self.at += len(literal)
                return True
            if self.ended or not literal.startswith(self.text[self.at :]):
                return False
            yield

    def take(self, literal: str) -> Steps[None]:
        """Raises Malformed unless `literal` is next."""
        if not (yield from self.follows(literal)):
            raise Malformed

    def word(self, letters: re.Pattern[str]) -> Steps[str]:
        """All that follows of `letters`, one or more of which the pattern matches."""
        start = self.at
        while (yield from self.peek()) and (found := letters.match(self.text, self.at)):
            self.at = found.end()
        return self.text[start : self.at]

    # ---- calls ----

    def begin(self, name: str) -> None:
        """A call, whose arguments begin here. Raises Malformed for a name that is none."""
        if not name or unmarked(name) != name or (self._names is not None and name not in self._names):
            raise Malformed
        self.events.append(CallBegun(self.calls, name))
        self._from = self.at

    def flush(self) -> None:
        """Hand out the arguments that were read so far."""
        if self._from is not None and self.at > self._from:
            new, self._from = unmarked(self.text[self._from : self.at]), self.at
            if new:
                self.events.append(Arguments(self.calls, new))

    def finish(self) -> None:
        """The call's arguments end here."""
        self.flush()
        self._end()

    def call(self, name: str, arguments: str) -> None:
        """A call that was read as a whole. Raises Malformed for a name that is none."""
        self.begin(name)
        self.events.append(Arguments(self.calls, arguments))
        self._end()

    def _end(self) -> None:
        self.events.append(CallEnded(self.calls))
        self.calls += 1
        self._from = None
