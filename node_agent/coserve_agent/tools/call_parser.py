"""Finds the calls in an answer, piece by piece. What begins as a call and is none is content, byte for byte.

White space beside a call is the template's and is left out; all other text is content, wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from coserve_agent.text.detokenize import overlap
from coserve_agent.text.marks import unmarked
from coserve_agent.tools.events import Event, Said
from coserve_agent.tools.format import Format
from coserve_agent.tools.reader import Malformed, Reader, Steps

_START, _BEHIND = re.compile(r"\s*"), re.compile(r"\s*;?\s*")
"""What may stand before a call without a marker, at the start of an answer and behind a call."""


class CallParser:
    """Of one answer.

    Args:
        names: the tools that there are.
        held: the answer is held to a grammar, so that what begins as a call is one, or is cut: arguments are handed
            out as they come. Else a call is handed out when it is whole.
        most: so many calls are handed out; those behind them are left out. None: all.
    """

    def __init__(self, format: Format, names: Collection[str], *, held: bool = False, most: int | None = None) -> None:
        self._format, self._names, self._held, self._most = format, names, held, most
        self._events: list[Event] = []
        self._text, self._at = "", 0
        """What is left to read, from a place in it on: it is looked at where it lies, as calls may be many."""
        self._blank = ""
        """White space behind what was said."""
        self._place: re.Pattern[str] | None = _START
        """What may stand before a call without a marker here; None where none may begin."""
        self._calls = 0
        self._unit: Steps[None] | None = None
        """What reads the call, or calls, behind a marker."""
        self._reader = Reader("")
        self._opening = ""
        """What stands before them."""
        self._handed_out = False
        """Whether anything of them was."""

    def feed(self, text: str) -> list[Event]:
        """What `text` adds."""
        return self._read(text, ended=False)

    def end(self) -> list[Event]:
        """What was held back at the end of the answer."""
        return self._read("", ended=True)

    def _read(self, text: str, *, ended: bool) -> list[Event]:
        if self._unit is None:
            self._text, self._at = self._text[self._at :] + text, 0
        else:
            self._reader.text += text
        while self._outside(ended) if self._unit is None else self._inside(self._unit, ended):
            pass
        if ended and self._blank and self._place is not _BEHIND:
            self._events.append(Said(self._blank))
        events, self._events = self._events, []
        return [one for one in events if self._most is None or getattr(one, "index", -1) < self._most]

    def _outside(self, ended: bool) -> bool:
        """Read on outside calls; whether there is more to read."""
        text, at = self._text, self._at
        if self._format.bare and self._place is not None:
            begin = found.end() if (found := self._place.match(text, at)) else at
            if begin == len(text) and not ended:
                return False
            if text.startswith("{", begin):
                self._begin(text[at:begin], begin, self._names)
                return True
        places = ((text.find(one, at), one) for one in self._format.markers)
        end, marker = min((one for one in places if one[0] >= 0), default=(len(text), ""))
        if marker:
            self._say(text[at:end])
            self._begin(marker, end + len(marker), None)
            return True
        end -= 0 if ended else max(overlap(text[max(at, end - len(one)) :], one) for one in self._format.markers)
        self._say(text[at:end])
        self._at = end
        return False

    def _begin(self, opening: str, at: int, names: Collection[str] | None) -> None:
        self._opening, self._at = opening, at
        self._reader = Reader(self._text, at, self._calls, names)
        self._unit = self._format.read(self._reader)
        self._handed_out = False

    def _inside(self, unit: Steps[None], ended: bool) -> bool:
        """Read on behind a marker; whether there is more to read."""
        self._reader.ended = ended
        try:
            next(unit)
        except StopIteration:
            self._hand_out()
            self._leave(self._reader.at, _BEHIND)
        except Malformed:
            self._give_up()
        else:
            if self._held:
                self._reader.flush()
                self._hand_out()
            return False
        return True

    def _give_up(self) -> None:
        """It is no call, or was cut."""
        if self._handed_out:
            self._reader.flush()
            self._hand_out()
            self._calls += 1
            self._leave(self._reader.at, None)
        else:
            self._say(self._opening)
            self._leave(self._at, None)

    def _leave(self, at: int, place: re.Pattern[str] | None) -> None:
        """Read on outside."""
        self._text, self._at = self._reader.text, at
        self._unit, self._place = None, place

    def _hand_out(self) -> None:
        if self._reader.events:
            self._events += self._reader.events
            self._reader.events = []
            self._calls, self._blank, self._handed_out = self._reader.calls, "", True

    def _say(self, text: str) -> None:
        text = self._blank + unmarked(text)
        said = text.rstrip()
        self._blank = text[len(said) :]
        if said:
            self._events.append(Said(said))
            self._place = None
