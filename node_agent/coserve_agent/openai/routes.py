"""The routes of the OpenAI-compatible API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coserve_agent.adapters.served import Served
from coserve_agent.chat.message import MessageError
from coserve_agent.chat.template import ChatTemplateError, Given
from coserve_agent.chat.variables import TemplateVariableError, check_variables, together, try_variables
from coserve_agent.generation.generator import Generator
from coserve_agent.http.body import read_json
from coserve_agent.http.errors import (
    ApiError,
    bad_request,
    on_api_error,
    on_client_gone,
    on_unknown_path,
    on_wrong_method,
)
from coserve_agent.http.middleware import AnswerMistakes
from coserve_agent.http.stream import ClientGoneError
from coserve_agent.openai.respond import respond
from coserve_agent.requests.chat import parse_chat
from coserve_agent.requests.completion import parse_completion
from coserve_agent.requests.prompts import Prompt, check_ids, read_prompts
from coserve_agent.requests.reading import check_offer, reading_of
from coserve_agent.requests.structured import structure_of
from coserve_agent.tools.answer_format import AnswerFormat

DEFAULT_COMPLETION_TOKENS = 16
VARIABLES = "chat_template_kwargs"


def build(generator: Generator, answers: AnswerFormat, version: str, max_body_bytes: int) -> FastAPI:
    """The application of the HTTP port; `answers` is how the model writes calls and thoughts."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_middleware(AnswerMistakes)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(404, on_unknown_path)
    app.add_exception_handler(405, on_wrong_method)
    tokenizer = generator.tokenizer

    async def body_of(request: Request) -> dict[str, Any]:
        generator.check_open()
        body = await read_json(request, max_body_bytes)
        if body.get("model") in (None, ""):  # as in vLLM
            body["model"] = generator.models.listing()[0].name
        return body

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_chat(await body_of(request))
        served = generator.served(parsed.model)
        generator.check_choices(1, parsed)
        check_offer(parsed, answers)
        given = parsed.chat_template_kwargs or {}
        with _blaming_variables():
            check_variables(tokenizer, given, VARIABLES)
        offered = Given([tool.shown() for tool in parsed.tools or ()], together(tokenizer, served.variables, given))
        try:
            messages = [message.plain(tokenizer.written_fields) for message in parsed.messages]
            # A template is a program of whoever made the model's folder: nobody else waits for it.
            prompt = await asyncio.to_thread(
                tokenizer.encode_chat,
                messages,
                offered,
                asks=parsed.add_generation_prompt is not False,
                continues=bool(parsed.continue_final_message),
            )
        except MessageError as error:
            code = "unsupported_parameter" if error.unsupported else "invalid_value"
            raise bad_request(str(error), "messages", code) from None
        except ChatTemplateError as error:
            with _blaming_variables():
                await asyncio.to_thread(try_variables, tokenizer, given, VARIABLES, messages)
            raise bad_request(f"messages: {error}", "messages", "invalid_value") from None
        check_ids(prompt, generator.vocab_size, "messages")
        limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
        reading, structure = reading_of(parsed, answers, tokenizer, prompt)
        prompts = [Prompt(prompt, limit, reading=reading, structure=structure)]
        return await respond(generator, request, parsed, prompts, arrival_s)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_completion(await body_of(request))
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
        return await respond(generator, request, parsed, prompts, arrival_s)

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
        body = await read_json(request, max_body_bytes)
        text = body.get("prompt")
        if not isinstance(text, str):
            raise bad_request(f"prompt is {type(text).__name__}; send a string", "prompt", "invalid_value")
        tokens = await generator.encode(lambda: tokenizer.encode(text), len(text))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": generator.max_model_length}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        tokens = (await read_json(request, max_body_bytes)).get("tokens")
        if not isinstance(tokens, list) or not all(type(one) is int and 0 <= one < tokenizer.size for one in tokens):
            raise bad_request(f"tokens must be a list of ids from 0 to {tokenizer.size - 1}", "tokens", "invalid_value")
        return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version}

    return app


@contextmanager
def _blaming_variables() -> Iterator[None]:
    """Raises ApiError 400 for variables that cannot be set."""
    try:
        yield
    except TemplateVariableError as error:
        raise bad_request(str(error), VARIABLES, "invalid_value") from None


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
