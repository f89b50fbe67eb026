"""How an answer is written: whole or as a stream of events, for one choice or several."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from coserve_agent.generation.generation import Generation, Piece
from coserve_agent.generation.interleaved import interleaved
from coserve_agent.generation.transcript import ScoredToken, prompt_tokens
from coserve_agent.http.errors import ApiError
from coserve_agent.http.stream import DONE, error_event, event
from coserve_agent.openai.choice import Choice
from coserve_agent.openai.logprobs import Writer
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt
from coserve_agent.text.pieces import Pieces


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
        async with aclosing(interleaved(self._generations)) as pieces:
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
        usage = {"usage": self._usage(), **self._metrics()}
        answer = {**self._head, "object": kind, "choices": choices, **usage, **self._prompt_ids()}
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
            yield event({**head, "choices": [], "usage": self._usage(), **self._metrics()})
        yield DONE

    def failed(self, error: ApiError) -> bytes:
        return error_event(error)

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

    def _metrics(self) -> dict[str, Any]:
        """vLLM's field, where it is asked for: times are those of a single choice."""
        if not self._request.include_metrics:
            return {}
        return {"metrics": self._generations[0].timing() if len(self._generations) == 1 else None}

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
