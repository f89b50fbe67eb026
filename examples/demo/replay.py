"""Send a schedule through an unmodified OpenAI client and note when each token came."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import openai

from demo.trace import Recorded


@dataclass
class Sample:
    """One request as its client saw it; times are seconds of the monotonic clock."""

    due_s: float
    wanted_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    name: str = ""
    """The answer's id, by which the agent knows the request too."""
    error: str | None = None
    done: bool = False

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


@dataclass(frozen=True)
class Slo:
    """The promise, in seconds."""

    ttft_s: float
    tpot_s: float

    def attained(self, sample: Sample) -> bool:
        """Strictly: the first token in time, and the request's P99 gap within the promise. A failure is a miss."""
        if sample.error is not None or sample.ttft_s is None:
            return False
        return sample.ttft_s <= self.ttft_s and percentile(sample.gaps_s, 99) <= self.tpot_s


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed; 0 for none."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


class Prompts:
    """Text of a wanted number of tokens, cut from a corpus."""

    def __init__(self, corpus: str, model_folder: str) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415  (only the replay needs it)

        self._tokenizer = Tokenizer.from_file(f"{model_folder}/tokenizer.json")
        self._ids: list[int] = self._tokenizer.encode(corpus).ids
        self._at = 0

    def take(self, tokens: int) -> str:
        if self._at + tokens > len(self._ids):
            self._at = 0
        ids = self._ids[self._at : self._at + tokens]
        self._at += tokens
        return str(self._tokenizer.decode(ids))


class Replayer:
    """Sends each request at its time, over a connection of its own, so that a Service spreads them over its agents."""

    def __init__(self, base_urls: Sequence[str], model: str, prompts: Prompts) -> None:
        limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
        self._clients = [
            openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key="none",
                max_retries=0,
                http_client=httpx.AsyncClient(limits=limits, timeout=60),
            )
            for url in base_urls
        ]
        self._model, self._prompts = model, prompts
        self.samples: list[Sample] = []

    async def run(self, arrivals: Sequence[Recorded], started_s: float) -> None:
        """Send all arrivals relative to `started_s` and wait until the last has ended."""
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                due = started_s + arrival.at_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                sample = Sample(due, arrival.output_tokens)
                self.samples.append(sample)
                client = self._clients[number % len(self._clients)]
                group.create_task(self._send(client, sample, self._prompts.take(arrival.prompt_tokens)))

    async def _send(self, client: openai.AsyncOpenAI, sample: Sample, prompt: str) -> None:
        try:
            stream = await client.completions.create(
                model=self._model,
                prompt=prompt,
                max_tokens=sample.wanted_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                sample.name = chunk.id
                if chunk.choices and (chunk.choices[0].text or not chunk.choices[0].finish_reason):
                    sample.token_times_s.append(time.monotonic())
        except (openai.OpenAIError, httpx.HTTPError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        sample.done = True

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
