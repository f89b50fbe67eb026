"""How an answer is written: whole or as a stream of events, for one choice or several, in either API's form."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coserve_agent.concurrency import end
from coserve_agent.http.generate import Generation, Generator, Piece
from coserve_agent.http.logprobs import CompletionLogprobs, ScoredToken, chat_logprobs
from coserve_agent.http.params import ChatRequest, Common
from coserve_agent.http.stream import DONE, EventStream, event, unless_gone
from coserve_agent.tokenizer import Tokenizer


class Choice:
    """One choice of an answer, and how its parts are written."""

    def __init__(self, index: int, chat: bool, logprobs: bool, tokenizer: Tokenizer) -> None:
        self._index, self._chat, self._logprobs = index, chat, logprobs
        self._tokenizer = tokenizer
        self._completion_logprobs = CompletionLogprobs(tokenizer)

    def whole(self, piece: Piece, finish: str | None) -> dict[str, Any]:
        """An entry of `choices` with the whole text."""
        answer: dict[str, Any] = (
            {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            if self._chat
            else {"text": piece.text}
        )
        return self._entry(answer, piece.tokens, finish)

    def chunks(self, piece: Piece, finish: str | None, *, first: bool) -> list[dict[str, Any]]:
        """The same for the next piece of a stream. A chat says by an entry of its own that it has ended.

        A piece without characters is written too: clients measure the time between tokens by it.
        """
        if not self._chat:
            return [self._entry({"text": piece.text}, piece.tokens, finish)]
        entries = []
        if first or piece.text or piece.tokens or finish is None:
            role = {"role": "assistant"} if first else {}
            entries.append(self._entry({"delta": {**role, "content": piece.text}}, piece.tokens, None))
        if finish is not None:
            entries.append(self._entry({"delta": {}}, (), finish))
        return entries

    def _entry(self, answer: dict[str, Any], tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and (tokens or not self._chat):
            logprobs = chat_logprobs(self._tokenizer, tokens) if self._chat else self._completion_logprobs.show(tokens)
        return {"index": self._index, **answer, "logprobs": logprobs, "finish_reason": finish}


class Answer:
    """The choices of one request as they come. `echo` is the prompt's text where it is part of the answer."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        request: Common,
        prompt: Sequence[int],
        echo: str,
        generations: list[Generation],
    ) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{name}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": None,
        }
        self._with_usage = request.stream_options is not None and request.stream_options.include_usage
        self._prompt, self._echo = prompt, echo
        self._generations = generations
        logprobs = request.output_logprobs is not None
        self._choices = [Choice(index, self._chat, logprobs, tokenizer) for index in range(len(generations))]

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """Pieces of all choices as they come, with the number of the choice."""
        first = set(range(len(self._generations)))
        async with aclosing(_interleaved(self._generations)) as pieces:
            async for n, piece in pieces:
                yield n, self._after_prompt(piece, self._generations[n]) if n in first else piece
                first.discard(n)

    async def whole(self) -> dict[str, Any]:
        """The answer that is no stream."""
        texts: list[list[str]] = [[] for _ in self._choices]
        tokens: list[list[ScoredToken]] = [[] for _ in self._choices]
        async with aclosing(self.pieces()) as pieces:
            async for n, piece in pieces:
                texts[n].append(piece.text)
                tokens[n].extend(piece.tokens)
        choices = [
            choice.whole(Piece("".join(texts[n]), tuple(tokens[n])), self._generations[n].finish_reason)
            for n, choice in enumerate(self._choices)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    async def events(
        self, pieces: AsyncGenerator[tuple[int, Piece]], first: tuple[int, Piece]
    ) -> AsyncGenerator[bytes]:
        """The answer as a stream: `first`, which came from `pieces`, and the rest of them."""
        head = {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion"}
        begun: set[int] = set()
        async with aclosing(pieces):
            numbered: tuple[int, Piece] | None = first
            while numbered is not None:
                generation = self._generations[numbered[0]]
                generation.meter.writing()
                for data in self._chunks(head, numbered, begun):
                    yield data
                generation.meter.written(generation.completion_tokens)
                numbered = await anext(pieces, None)
        if self._with_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunks(self, head: dict[str, Any], numbered: tuple[int, Piece], begun: set[int]) -> list[bytes]:
        n, piece = numbered
        entries = self._choices[n].chunks(piece, self._generations[n].finish_reason, first=n not in begun)
        begun.add(n)
        usage = {"usage": None} if self._with_usage else {}
        return [event({**head, "choices": [entry], **usage}) for entry in entries]

    def _after_prompt(self, piece: Piece, generation: Generation) -> Piece:
        scored = [
            ScoredToken(token, scores) for token, scores in zip(self._prompt, generation.prompt_scores, strict=False)
        ]
        return Piece(self._echo + piece.text, (*scored, *piece.tokens))

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self._prompt), sum(one.completion_tokens for one in self._generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._generations[0].cached_tokens},
        }


async def _interleaved(generations: list[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    if len(generations) == 1:  # nearly always, and a task for each token would cost as much as writing it
        while not generations[0].done:
            yield 0, await generations[0].next_piece()
        return
    tasks = {asyncio.create_task(one.next_piece()): n for n, one in enumerate(generations)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                n = tasks.pop(task)
                yield n, task.result()
                if not generations[n].done:
                    tasks[asyncio.create_task(generations[n].next_piece())] = n
    finally:
        await end(*tasks)


async def answer(
    generator: Generator,
    request: Request,
    parsed: Common,
    prompt: list[int],
    max_tokens: int | None,
    arrival_s: float,
    echo: str = "",
) -> Response:
    """Generate and answer; the generations end with the answer, or with the client."""
    name = uuid.uuid4().hex
    generations = generator.begin(name, prompt, parsed, max_tokens, arrival_s)

    def finish() -> None:
        for generation in generations:
            generator.end(generation)

    written = Answer(name, generator.tokenizer, parsed, prompt, echo, generations)
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
