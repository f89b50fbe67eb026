"""From a checked request to its response, in the words of whichever API it came by."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coserve_agent.generation.generation import Generation, Piece
from coserve_agent.generation.generator import Generator
from coserve_agent.http.errors import ApiError
from coserve_agent.http.stream import EventStream, unless_gone
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt

Numbered = tuple[int, Piece]
"""A piece, with the number of its choice."""


class Answer(Protocol):
    """How an API writes the answer of some generations."""

    def pieces(self) -> AsyncGenerator[Numbered]:
        """Of all choices, as they come."""
        ...

    async def whole(self) -> dict[str, Any]:
        """The answer that is no stream."""
        ...

    def events(self, pieces: AsyncGenerator[Numbered], first: Numbered) -> AsyncGenerator[bytes]:
        """The answer as a stream: `first`, which came from `pieces`, and the rest of them."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""
        ...


async def respond(
    generator: Generator,
    request: Request,
    parsed: Common,
    prompts: Sequence[Prompt],
    arrival_s: float,
    written: Callable[[str, list[Generation]], Answer],
) -> Response:
    """Generate and answer, as `written` by the request's id and generations; these end with the answer, or with the
    client.
    """
    name = uuid.uuid4().hex
    begun = await generator.begin(name, prompts, parsed, arrival_s)

    def finish() -> None:
        generator.finish(begun)

    answer = written(name, begun.generations)
    streaming = False
    try:
        if not parsed.stream:
            return JSONResponse(await unless_gone(request.receive, answer.whole()))
        pieces = answer.pieces()
        # The first text decides the status: an error before it is still a proper answer.
        first = await unless_gone(request.receive, _next(pieces))
        streaming = True
        return EventStream(answer.events(pieces, first), finish, answer.failed)
    finally:
        if not streaming:
            finish()


async def _next(pieces: AsyncGenerator[Numbered]) -> Numbered:
    return await anext(pieces)
