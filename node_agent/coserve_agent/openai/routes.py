"""The routes of OpenAI's API, and vLLM's two for text and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from coserve_agent.adapters.served import Served
from coserve_agent.generation.chat import Serving
from coserve_agent.generation.generation import Generation
from coserve_agent.generation.respond import respond
from coserve_agent.http.body import read_json
from coserve_agent.openai.answer import Answer
from coserve_agent.openai.tokens import DetokenizeRequest, TokenizeRequest, parse_tokens
from coserve_agent.requests.chat import parse_chat
from coserve_agent.requests.common import Common
from coserve_agent.requests.completion import parse_completion
from coserve_agent.requests.prompts import Prompt, check_ids, read_prompts
from coserve_agent.requests.structured import structure_of

DEFAULT_COMPLETION_TOKENS = 16


def add(app: FastAPI, serving: Serving) -> None:
    """Let `app` answer them."""
    generator = serving.generator
    tokenizer = generator.tokenizer

    async def answered(request: Request, parsed: Common, prompts: Sequence[Prompt], arrival_s: float) -> Response:
        def written(name: str, generations: list[Generation]) -> Answer:
            return Answer(name, tokenizer.pieces, parsed, prompts, generations)

        return await respond(generator, request, parsed, prompts, arrival_s, written)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_chat(await serving.body(request))
        return await answered(request, parsed, [await serving.prompt(parsed)], arrival_s)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_completion(await serving.body(request))
        generator.served(parsed.model)
        given, echo, vocab_size = parsed.prompts, bool(parsed.echo), generator.vocab_size
        generator.check_choices(len(given), parsed)
        chars = sum(len(one) for one in given)
        usual = min(DEFAULT_COMPLETION_TOKENS, generator.defaults.max_tokens or DEFAULT_COMPLETION_TOKENS)
        encoded = await generator.encode(lambda: read_prompts(tokenizer, given, vocab_size, echo=echo), chars)
        structure, prompts = structure_of(parsed), []
        for prompt in encoded:
            room = generator.max_model_length - len(prompt.tokens)
            limit = min(usual, max(room, 1)) if parsed.max_tokens is None else parsed.max_tokens
            prompts.append(replace(prompt, max_tokens=limit, structure=structure))
        return await answered(request, parsed, prompts, arrival_s)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_model(one, generator.max_model_length) for one in generator.models.listing()],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(generator.served(name), generator.max_model_length)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        asked = parse_tokens(TokenizeRequest, await read_json(request, serving.max_body_bytes))
        text, special = asked.prompt, asked.add_special_tokens
        tokens = await generator.encode(lambda: tokenizer.encode(text, special), len(text))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": generator.max_model_length}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        tokens = parse_tokens(DetokenizeRequest, await read_json(request, serving.max_body_bytes)).tokens
        check_ids(tokens, tokenizer.size, "tokens")
        return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}


def _model(served: Served, max_model_length: int) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created_s,
        "owned_by": "coserve",
        "root": served.root,
        "parent": served.parent,
        "max_model_len": max_model_length,
    }
