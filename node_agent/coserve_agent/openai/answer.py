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
from coserve_agent.generation.generate import Generation, Generator, Piece
from coserve_agent.generation.transcript import ScoredToken, prompt_tokens
from coserve_agent.http.stream import DONE, EventStream, event, unless_gone
from coserve_agent.openai.logprobs import Writer
from coserve_agent.requests.params import ChatRequest, Common
from coserve_agent.requests.prompts import Prompt
from coserve_agent.text.pieces import Pieces


class Choice:
    """One choice of an answer, and how its parts are written."""

    def __init__(self, index: int, prompt: Prompt, request: Common, writer: Writer) -> None:
        self._index, self._prompt, self._writer = index, prompt, writer
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.output_logprobs is not None
        self._ids = bool(request.return_token_ids)

    def whole(self, piece: Piece, finish: str | None) -> dict[str, Any]:
        """An entry of `choices` with the whole text."""
        answer: dict[str, Any] = (
            {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            if self._chat
            else {"text": piece.text}
        )
        return self._entry(answer, piece, finish, first=True)

    def chunks(self, piece: Piece, finish: str | None, *, first: bool) -> list[dict[str, Any]]:
        """The same for the next piece of a stream. A chat says by an entry of its own that it has ended.

        A piece without characters is written too: clients measure the time between tokens by it.
        """
        if not self._chat:
            return [self._entry({"text": piece.text}, piece, finish, first=first)]
        entries = []
        if first or piece.text or piece.tokens or (self._ids and piece.ids) or finish is None:
            role = {"role": "assistant"} if first else {}
            entries.append(self._entry({"delta": {**role, "content": piece.text}}, piece, None, first=first))
        if finish is not None:
            entries.append(self._entry({"delta": {}}, Piece(""), finish, first=False))
        return entries

    def _entry(self, answer: dict[str, Any], piece: Piece, finish: str | None, *, first: bool) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and (piece.tokens or not self._chat):
            logprobs = self._writer.chat(piece.tokens) if self._chat else self._writer.completion(piece.tokens)
        entry = {"index": self._index, **answer, "logprobs": logprobs, "finish_reason": finish}
        if self._ids:
            entry["token_ids"] = list(piece.ids)
            if first and not self._chat:
                entry["prompt_token_ids"] = list(self._prompt.tokens)
        return entry


class Answer:
    """The choices of one request as they come, those of its first prompt first."""

    def __init__(
        self,
        name: str,
        pieces: Pieces,
        request: Common,
        prompts: Sequence[Prompt],
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
        self._pieces, self._request, self._prompts = pieces, request, prompts
        self._generations = generations
        self._per_prompt = len(generations) // len(prompts)
        self._writer = Writer(pieces, request.output_logprobs or 0, as_ids=bool(request.return_tokens_as_token_ids))
        self._choices = [Choice(n, self._prompt_of(n), request, self._writer) for n in range(len(generations))]

    def _prompt_of(self, n: int) -> Prompt:
        return self._prompts[n // self._per_prompt]

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """Pieces of all choices as they come, with the number of the choice."""
        first = set(range(len(self._generations)))
        async with aclosing(_interleaved(self._generations)) as pieces:
            async for n, piece in pieces:
                yield n, self._behind_prompt(n, piece) if n in first else piece
                first.discard(n)

    async def whole(self) -> dict[str, Any]:
        """The answer that is no stream."""
        parts: list[list[Piece]] = [[] for _ in self._choices]
        async with aclosing(self.pieces()) as pieces:
            async for n, piece in pieces:
                parts[n].append(piece)
        choices = []
        for n, choice in enumerate(self._choices):
            entry = choice.whole(_joined(parts[n]), self._generations[n].finish_reason)
            choices.append(entry if self._chat else entry | self._prompt_logprobs(n))
        kind = "chat.completion" if self._chat else "text_completion"
        answer = {**self._head, "object": kind, "choices": choices, "usage": self._usage(), **self._prompt_ids()}
        return answer | (self._prompt_logprobs(0) if self._chat else {})

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
                if generation.meter.written(generation.completion_tokens):
                    for other in self._generations:
                        other.meter.blocked(generation.meter.blocked_until_s)
                numbered = await anext(pieces, None)
        if self._with_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunks(self, head: dict[str, Any], numbered: tuple[int, Piece], begun: set[int]) -> list[bytes]:
        n, piece = numbered
        entries = self._choices[n].chunks(piece, self._generations[n].finish_reason, first=n not in begun)
        prompt_ids = {} if begun else self._prompt_ids()
        begun.add(n)
        usage = {"usage": None} if self._with_usage else {}
        return [
            event({**head, "choices": [entry], **usage, **({} if number else prompt_ids)})
            for number, entry in enumerate(entries)
        ]

    def _behind_prompt(self, n: int, piece: Piece) -> Piece:
        """The first piece of a choice, with the prompt before it where the client asked for that."""
        prompt = self._prompt_of(n)
        scored = prompt_tokens(self._pieces, prompt, self._generations[n].prompt_scores) if prompt.starts else []
        return Piece(prompt.text + piece.text, (*scored, *piece.tokens), piece.ids)

    def _prompt_ids(self) -> dict[str, Any]:
        """vLLM's field of a chat's answer, and of its first chunk; in completions each choice has it."""
        wanted = self._chat and self._request.return_token_ids
        return {"prompt_token_ids": list(self._prompts[0].tokens)} if wanted else {}

    def _prompt_logprobs(self, n: int) -> dict[str, Any]:
        """vLLM's field of a chat's answer; in completions each choice has it."""
        top = self._request.prompt_logprobs
        if top is None:
            return {}
        scored = prompt_tokens(self._pieces, self._prompt_of(n), self._generations[n].prompt_scores)
        return {"prompt_logprobs": self._writer.prompt(scored, top)}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(one.tokens) for one in self._prompts)
        completion = sum(one.completion_tokens for one in self._generations)
        cached = sum(one.cached_tokens for one in self._generations[:: self._per_prompt])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _joined(pieces: Sequence[Piece]) -> Piece:
    tokens: list[ScoredToken] = [token for piece in pieces for token in piece.tokens]
    ids = [token for piece in pieces for token in piece.ids]
    return Piece("".join(piece.text for piece in pieces), tuple(tokens), tuple(ids))


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
