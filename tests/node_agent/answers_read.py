"""An answer that is read in pieces, put together as clients do it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coserve_agent.tools.events import Arguments, CallBegun, CallEnded, Event, Said, Thought
from coserve_agent.tools.reading import AnswerParser, Reading


@dataclass
class Found:
    """`calls` are (name, arguments, whether they ended)."""

    content: str = ""
    thought: str = ""
    calls: list[tuple[str, str, bool]] = field(default_factory=list)


def put_together(events: Iterable[Event]) -> Found:
    found = Found()
    for event in events:
        match event:
            case Said(text):
                assert text
                found.content += text
            case Thought(text):
                assert text
                found.thought += text
            case CallBegun(index, name):
                assert index == len(found.calls)
                found.calls.append((name, "", False))
            case Arguments(index, text):
                assert index == len(found.calls) - 1 and text
                name, before, ended = found.calls[index]
                assert not ended
                found.calls[index] = (name, before + text, False)
            case CallEnded(index):
                assert index == len(found.calls) - 1
                found.calls[index] = (*found.calls[index][:2], True)
    return found


def read(reading: Reading, pieces: Iterable[str]) -> Found:
    parser = AnswerParser(reading)
    events = [event for piece in pieces for event in parser.read(piece, ended=False)]
    return put_together([*events, *parser.read("", ended=True)])


def cuts(text: str, at_once: int = 1) -> list[str]:
    return [text[at : at + at_once] for at in range(0, len(text), at_once)]


def read_all_ways(reading: Reading, text: str) -> Found:
    """The same whether it comes whole, letter by letter, or cut in two anywhere."""
    whole = read(reading, [text])
    for at_once in (1, 2, 3, 7):
        assert read(reading, cuts(text, at_once)) == whole
    for at in range(1, len(text)):
        assert read(reading, [text[:at], text[at:]]) == whole
    return whole
