"""The client whose times judge the demo, in a process that does nothing else: it sends a schedule and notes when each
token came. A heartbeat of its own tells when it stood still itself, so that this is not taken for the server's.

`python -m demo.client` reads its Work as a line of JSON from standard input, says `ready`, reads when to begin (seconds
of the monotonic clock), and then writes a line of JSON a second: what is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from demo.replay import Prompts, Replayer, Sample
from demo.trace import Recorded

READY = "ready"
BEAT_S = 0.01
STALL_S = 0.02
"""A beat that is so late was a stall of the client."""
SAY_S = 1.0


@dataclass(frozen=True)
class Work:
    """What a client is to do: a schedule, and what its prompts are cut from."""

    urls: list[str]
    model: str
    corpus: str
    tokenizer: str
    arrivals: list[Recorded]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        fields = json.loads(text)
        return cls(**{**fields, "arrivals": [Recorded(**one) for one in fields["arrivals"]]})


class News:
    """What is new of samples and stalls since it was asked last, as plain data; `apply` is the other end of it."""

    def __init__(self, samples: Sequence[Sample], stalls: list[tuple[float, float]]) -> None:
        self._samples, self._stalls = samples, stalls
        self._told: list[tuple[int, bool]] = []
        self._stalls_told = 0

    def take(self) -> dict[str, Any]:
        changed = []
        for number, sample in enumerate(self._samples):
            if number == len(self._told):
                self._told.append((-1, False))
            tokens, done = self._told[number]
            if (len(sample.token_times_s), sample.done) == (tokens, done):
                continue
            self._told[number] = len(sample.token_times_s), sample.done
            changed.append(
                {
                    "number": number,
                    "due_s": sample.due_s,
                    "wanted_tokens": sample.wanted_tokens,
                    "new_times_s": sample.token_times_s[max(0, tokens) :],
                    "name": sample.name,
                    "error": sample.error,
                    "done": sample.done,
                }
            )
        stalls, self._stalls_told = self._stalls[self._stalls_told :], len(self._stalls)
        return {"samples": changed, "stalls": stalls}

    @staticmethod
    def apply(news: dict[str, Any], samples: list[Sample], stalls: list[tuple[float, float]]) -> None:
        for one in news["samples"]:
            if one["number"] == len(samples):
                samples.append(Sample(one["due_s"], one["wanted_tokens"]))
            sample = samples[one["number"]]
            sample.token_times_s += one["new_times_s"]
            sample.name, sample.error, sample.done = one["name"], one["error"], one["done"]
        stalls += [(began_s, ended_s) for began_s, ended_s in news["stalls"]]


def go_first() -> None:
    """Run before all others where that is allowed: a user's client shares no core with the server."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


async def run(work: Work) -> None:
    replayer = Replayer(work.urls, work.model, Prompts(work.corpus, work.tokenizer))
    stalls: list[tuple[float, float]] = []
    news = News(replayer.samples, stalls)
    print(READY, flush=True)
    go_first()
    started_s = float(await asyncio.to_thread(sys.stdin.readline))
    gc.collect()
    gc.freeze()  # a full round of the collector would be seen as a gap of every request
    beating, saying = asyncio.create_task(_beat(stalls)), asyncio.create_task(_say(news))
    await replayer.run(work.arrivals, started_s)
    for task in (beating, saying):
        task.cancel()
    print(json.dumps(news.take()), flush=True)
    await replayer.close()


async def _beat(stalls: list[tuple[float, float]]) -> None:
    while True:
        due_s = time.monotonic() + BEAT_S
        await asyncio.sleep(BEAT_S)
        now_s = time.monotonic()
        if now_s - due_s > STALL_S:
            stalls.append((due_s, now_s))


async def _say(news: News) -> None:
    while True:
        await asyncio.sleep(SAY_S)
        print(json.dumps(news.take()), flush=True)


if __name__ == "__main__":
    asyncio.run(run(Work.from_json(sys.stdin.readline())))
