"""Sends a schedule through connections of its own and notes when each token came.

It is an open loop: what is due is sent, however many answers are on the way, and a request's clock begins when it is
due, so that a client which is late itself is no excuse.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from coserve_cli.load.arrivals import Arrival

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
CORPUS_WORDS = 4096


@dataclass
class Sample:
    """One request as its client saw it; times are seconds of the monotonic clock."""

    due_s: float
    prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    """As the server counts them, since an event may hold several."""
    ended_s: float = 0.0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


class Prompts:
    """Prompts of a wanted number of tokens: ids, where the server says how it cuts a text, else as many words."""

    def __init__(self, ids: list[int] | None, seed: int) -> None:
        self._words = WORDS.split()
        self._ids, self._at = ids, seed

    def take(self, tokens: int) -> str | list[int]:
        self._at += 1
        if self._ids is None:
            return " ".join(self._words[(self._at * 7 + n) % len(self._words)] for n in range(tokens))
        return [self._ids[(self._at * 7919 + n) % len(self._ids)] for n in range(tokens)]


async def prompts_of(http: httpx.AsyncClient, seed: int) -> Prompts:
    """Prompts for that server."""
    words = WORDS.split()
    text = " ".join(words[n * n % len(words)] for n in range(CORPUS_WORDS))
    try:
        answer = await http.post("/tokenize", json={"prompt": text})
        ids = answer.json()["tokens"] if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError):
        ids = None
    return Prompts(ids or None, seed)


async def send_all(
    http: httpx.AsyncClient,
    model: str,
    arrivals: Sequence[Arrival],
    prompts: Prompts,
    samples: list[Sample],
    on_change: Callable[[], None],
) -> None:
    """Send each in its time, and wait until the last has ended. They are put into `samples`, so that a run which is
    broken off leaves what there was; `on_change` is called when one is sent and when it ends.
    """
    begun_s = time.monotonic()

    async def one(sample: Sample, body: dict[str, Any]) -> None:
        await _send(http, sample, body)
        on_change()

    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            body = {
                "model": model,
                "prompt": prompts.take(arrival.prompt_tokens),
                "max_tokens": arrival.output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            due_s = begun_s + arrival.at_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            samples.append(Sample(due_s, arrival.prompt_tokens))
            group.create_task(one(samples[-1], body))
            on_change()


async def _send(http: httpx.AsyncClient, sample: Sample, body: dict[str, Any]) -> None:
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                sample.error = f"{answer.status_code}: {_message(answer)}"
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    break
                _take(sample, json.loads(line.removeprefix("data: ")), time.monotonic())
            else:
                sample.error = sample.error or "the answer broke off"
    except (httpx.HTTPError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    finally:
        sample.ended_s = time.monotonic()
    if sample.error is None and not sample.tokens:
        sample.error = "the answer has no token"


def _take(sample: Sample, event: dict[str, Any], now_s: float) -> None:
    if "error" in event:
        sample.error = str(event["error"])
        return
    for choice in event.get("choices", ()):
        if choice.get("text") or not choice.get("finish_reason"):
            sample.token_times_s.append(now_s)
    if usage := event.get("usage"):
        sample.tokens = int(usage["completion_tokens"])


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
