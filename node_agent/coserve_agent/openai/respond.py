"""From a checked request to its response."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coserve_agent.generation.generation import Piece
from coserve_agent.generation.generator import Generator
from coserve_agent.http.stream import EventStream, unless_gone
from coserve_agent.openai.answer import Answer
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt


async def respond(
    generator: Generator,
    request: Request,
    parsed: Common,
    prompts: Sequence[Prompt],
    arrival_s: float,
) -> Response:
    """Generate and answer; the generations end with the answer, or with the client."""
    name = uuid.uuid4().hex
    generations = generator.begin(name, prompts, parsed, arrival_s)

    def finish() -> None:
        for generation in generations:
            generator.end(generation)

    written = Answer(name, generator.tokenizer.pieces, parsed, prompts, generations)
    streaming = False
    try:
        if not parsed.stream:
            return JSONResponse(await unless_gone(request.receive, written.whole()))
        pieces = written.pieces()
        # The first text decides the status: an error before it is still a proper answer.
        first = await unless_gone(request.receive, _next(pieces))
        streaming = True
        return EventStream(written.events(pieces, first), finish)
    finally:
        if not streaming:
            finish()


async def _next(pieces: AsyncGenerator[tuple[int, Piece]]) -> tuple[int, Piece]:
    return await anext(pieces)
