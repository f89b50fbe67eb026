"""The routes of Anthropic's Messages API."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from coserve_agent.generation.chat import Serving
from coserve_agent.generation.generation import Generation
from coserve_agent.generation.respond import respond
from coserve_agent.generation.single import SingleAnswer
from coserve_agent.http.errors import ANTHROPIC_ROUTE
from coserve_agent.http.renamed import renaming
from coserve_agent.messages.request import FIELDS, CountTokensRequest, MessagesRequest, parse_messages
from coserve_agent.messages.thinking import thinking_variables
from coserve_agent.messages.writer import MessageWriter
from coserve_agent.requests.chat import ChatRequest


def add(app: FastAPI, serving: Serving) -> None:
    """Let `app` answer them."""
    generator = serving.generator
    tokenizer = generator.tokenizer

    def of_chat(asked: CountTokensRequest) -> ChatRequest:
        variables = thinking_variables(asked.thinking, tokenizer, serving.answers)
        return asked.of_chat(variables, thoughts="reasoning_content" in tokenizer.written_fields)

    @app.post(ANTHROPIC_ROUTE)
    async def messages(request: Request) -> Response:
        arrival_s = generator.now_s()
        asked = parse_messages(MessagesRequest, await serving.body(request))
        with renaming(FIELDS):
            parsed = of_chat(asked)
            prompt = await serving.prompt(parsed)

            def written(name: str, generations: list[Generation]) -> SingleAnswer:
                return SingleAnswer(MessageWriter(name, asked.model), prompt, generations[0])

            return await respond(generator, request, parsed, [prompt], arrival_s, written)

    @app.post(f"{ANTHROPIC_ROUTE}/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        asked = parse_messages(CountTokensRequest, await serving.body(request))
        with renaming(FIELDS):
            return {"input_tokens": len((await serving.prompt(of_chat(asked))).tokens)}
