"""The route of OpenAI's Responses API."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from coserve_agent.generation.chat import Serving
from coserve_agent.generation.generation import Generation
from coserve_agent.generation.respond import respond
from coserve_agent.generation.single import SingleAnswer
from coserve_agent.http.renamed import renaming
from coserve_agent.responses.body import Body
from coserve_agent.responses.request import FIELDS, parse_responses
from coserve_agent.responses.writer import ResponseWriter


def add(app: FastAPI, serving: Serving) -> None:
    """Let `app` answer it."""
    generator = serving.generator

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        arrival_s = generator.now_s()
        asked = parse_responses(await serving.body(request))
        with renaming(FIELDS):
            parsed = asked.of_chat(thoughts="reasoning_content" in generator.tokenizer.written_fields)
            prompt = await serving.prompt(parsed)

            def written(name: str, generations: list[Generation]) -> SingleAnswer:
                writer = ResponseWriter(Body(name, asked, generator.defaults), timed=bool(asked.include_metrics))
                return SingleAnswer(writer, prompt, generations[0])

            return await respond(generator, request, parsed, [prompt], arrival_s, written)
