"""An answer of one choice, for APIs that are told what it is made of: thoughts, content, calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from coserve_agent.generation.generation import Generation, Piece
from coserve_agent.generation.interleaved import interleaved
from coserve_agent.generation.respond import Numbered
from coserve_agent.http.errors import ApiError
from coserve_agent.http.stream import typed_event
from coserve_agent.requests.prompts import Prompt
from coserve_agent.tools.events import Event, Thought
from coserve_agent.tools.reading import AnswerParser

Events = list[dict[str, Any]]
"""Of a stream, each with its `type`."""


@dataclass(frozen=True)
class Usage:
    """In tokens. `thought` are those up to the end of what was thought, a part of `completion`."""

    prompt: int
    cached: int
    completion: int
    thought: int


@dataclass(frozen=True)
class Ending:
    """How an answer ended: `finish` is the engine's reason."""

    finish: str
    stop_string: str | None
    usage: Usage
    timing: Callable[[], dict[str, float | None]] = dict


class Writer(Protocol):
    """Writes one answer, part by part, and gives the stream's events for each."""

    def opening(self, prompt: Usage) -> Events: ...

    def add(self, event: Event) -> Events: ...

    def ending(self, ending: Ending) -> Events: ...

    def whole(self) -> dict[str, Any]:
        """The answer that is no stream, after its ending."""
        ...

    def failed(self, error: ApiError) -> Events: ...


class SingleAnswer:
    """That of `generation` behind `prompt`."""

    def __init__(self, writer: Writer, prompt: Prompt, generation: Generation) -> None:
        self._writer, self._generation = writer, generation
        self._prompt_tokens = len(prompt.tokens)
        self._parser = AnswerParser(prompt.reading)
        self._tokens = self._thought_tokens = 0

    def pieces(self) -> AsyncGenerator[Numbered]:
        return interleaved([self._generation])

    async def whole(self) -> dict[str, Any]:
        self._writer.opening(self._usage())
        async with aclosing(self.pieces()) as pieces:
            async for _, piece in pieces:
                for _ in self._written(piece):
                    pass
        return self._writer.whole()

    async def events(self, pieces: AsyncGenerator[Numbered], first: Numbered) -> AsyncGenerator[bytes]:
        meter = self._generation.meter
        async with aclosing(pieces):
            for data in _sent(self._writer.opening(self._usage())):
                yield data
            numbered: Numbered | None = first
            while numbered is not None:
                meter.writing()
                for data in _sent(self._written(numbered[1])):
                    yield data
                meter.written(self._generation.completion_tokens)
                numbered = await anext(pieces, None)

    def failed(self, error: ApiError) -> bytes:
        return b"".join(_sent(self._writer.failed(error)))

    def _written(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece, read token by token: however they were taken together, they are counted alike."""
        ended = self._generation.done
        for n, text in enumerate(piece.texts, 1):
            self._tokens += 1
            for event in self._parser.read(text, ended=ended and n == len(piece.texts)):
                if isinstance(event, Thought):
                    self._thought_tokens = self._tokens
                yield from self._writer.add(event)
        if ended:
            generation, finish = self._generation, self._generation.finish_reason or ""
            ending = Ending(finish, generation.stop_string, self._usage(), generation.timing)
            yield from self._writer.ending(ending)

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._generation.cached_tokens, self._tokens, self._thought_tokens)


def _sent(events: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    return map(typed_event, events)
