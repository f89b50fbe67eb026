"""The routes of the OpenAI-compatible API."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from coserve_agent.http.errors import (
    ApiError,
    bad_request,
    on_api_error,
    on_client_gone,
    on_mistake,
    on_unknown_path,
    on_wrong_method,
)
from coserve_agent.http.generate import Generation, Generator, Served
from coserve_agent.http.params import Common, parse_chat, parse_completion
from coserve_agent.http.stream import DONE, ClientGoneError, EventStream, event, read_json, unless_gone
from coserve_agent.tokenizer import ChatTemplateError

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """How one of the two kinds of completion writes its answers."""

    id: str
    created: int
    model: str
    chat: bool

    def chunk(self, text: str, finish: str | None, with_usage: bool, first: bool = False) -> dict[str, Any]:
        if self.chat:
            role = {"role": "assistant"} if first else {}
            content = {"content": text} if text or first else {}
            choice: dict[str, Any] = {"index": 0, "delta": {**role, **content}}
        else:
            choice = {"index": 0, "text": text}
        body = self._head("chat.completion.chunk" if self.chat else "text_completion")
        body["choices"] = [{**choice, "logprobs": None, "finish_reason": finish}]
        if with_usage:
            body["usage"] = None
        return body

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        body = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**body, "choices": [], "usage": usage}

    def whole(self, text: str, finish: str | None, usage: dict[str, int]) -> dict[str, Any]:
        answer: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **answer, "logprobs": None, "finish_reason": finish}
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [choice],
            "usage": usage,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}


def build(generator: Generator, version: str, max_body_bytes: int) -> FastAPI:
    """The application of the HTTP port."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(Exception, on_mistake)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(404, on_unknown_path)
    app.add_exception_handler(405, on_wrong_method)
    tokenizer = generator.tokenizer

    async def body_of(request: Request) -> dict[str, Any]:
        generator.check_open()
        return await read_json(request, max_body_bytes)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_chat(await body_of(request))
        generator.served(parsed.model)
        messages = [message.plain() for message in parsed.messages]
        chars = sum(len(message["content"]) for message in messages)
        try:
            prompt = await generator.encode(lambda: tokenizer.encode_chat(messages), chars)
        except ChatTemplateError as error:
            raise bad_request(f"messages: {error}", "messages", "invalid_value") from None
        limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
        return await _answer(generator, request, parsed, prompt, limit, arrival_s, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        arrival_s = generator.now_s()
        parsed = parse_completion(await body_of(request))
        generator.served(parsed.model)
        text = parsed.prompt
        if isinstance(text, str):
            prompt = await generator.encode(lambda: tokenizer.encode(text), len(text))
        else:
            prompt = [int(token) for token in text if isinstance(token, int)]
        room = generator.max_model_length - len(prompt)
        limit = min(DEFAULT_COMPLETION_TOKENS, max(room, 1)) if parsed.max_tokens is None else parsed.max_tokens
        return await _answer(generator, request, parsed, prompt, limit, arrival_s, chat=False)

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


async def _answer(
    generator: Generator,
    request: Request,
    parsed: Common,
    prompt: list[int],
    max_tokens: int | None,
    arrival_s: float,
    *,
    chat: bool,
) -> Response:
    shape = Shape(f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), parsed.model, chat)
    generation = generator.begin(shape.id, prompt, parsed, max_tokens, arrival_s)
    streaming = False
    try:
        if parsed.stream:
            # The first text decides the status: an error before it is still a proper answer.
            first = await unless_gone(request.receive, generation.next_text())
            with_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
            streaming = True
            return EventStream(_events(shape, generation, first, with_usage), lambda: generator.end(generation))
        text = await unless_gone(request.receive, generation.whole_text())
        return JSONResponse(shape.whole(text, generation.finish_reason, _usage(generation)))
    finally:
        if not streaming:
            generator.end(generation)


async def _events(shape: Shape, generation: Generation, first: str, with_usage: bool) -> AsyncIterator[bytes]:
    text, is_first = first, True
    while True:
        finish = generation.finish_reason
        if shape.chat:
            if is_first or text:
                yield event(shape.chunk(text, None, with_usage, is_first))
            if finish is not None:
                yield event(shape.chunk("", finish, with_usage))
        else:
            yield event(shape.chunk(text, finish, with_usage))
        if finish is not None:
            break
        text, is_first = await generation.next_text(), False
    if with_usage:
        yield event(shape.usage_chunk(_usage(generation)))
    yield DONE


def _usage(generation: Generation) -> dict[str, int]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


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
