"""Requests of every kind, and all that each was told: what two engines that should agree are compared by."""

from __future__ import annotations

import random
from typing import Any

from engine_driver import Driver

from coserve_engine.messages import AddRequest, PromptDone, SamplingParams, TokenBatch
from coserve_engine.numerics import Numerics

SETTINGS = {"max_model_length": 256, "kv_cache_bytes": 2 << 20, "threads": 1}
TINY = {"kv_cache_bytes": 18 * 8192, "max_batch_tokens": 40, "numerics": Numerics(page=16)}
"""Room for about two requests: others are put out."""


def orders(draw_tokens: Any, seed: int, count: int = 12) -> list[AddRequest]:
    """Requests of every kind: drawn, penalised, scored, some that end by a token that they happen to choose."""
    source = random.Random(seed)
    made = []
    for n in range(count):
        params = SamplingParams(
            source.randint(1, 120),
            temperature=source.choice((0.0, 0.8, 3.0)),
            top_p=source.choice((1.0, 0.9)),
            seed=n,
            frequency_penalty=source.choice((0.0, 0.4)),
            min_tokens=0,
            stop_token_ids=tuple(source.sample(range(3, 120), source.choice((0, 0, 6)))),
            logprobs=source.choice((None, 0, 3)),
            prompt_logprobs=source.choice((None, None, 2)),
            ignore_eos=source.random() < 0.5,
        )
        made.append(AddRequest(f"r{n}", draw_tokens(n // 2, source.randint(1, 60)), params, 0.0))
    return made


def story(d: Driver) -> dict[str, list[object]]:
    """All that each request was told of its tokens."""
    found: dict[str, list[object]] = {}
    for event in d.events:
        if isinstance(event, PromptDone):
            found.setdefault(event.request_id, []).append(event.logprobs)
        for token in event.tokens if isinstance(event, TokenBatch) else ():
            found.setdefault(token.request_id, []).append((token.token, token.finish, token.logprobs))
    return found


def serve(d: Driver, asked: list[AddRequest], seed: int, *commands: Any) -> Driver:
    """The requests, a few at a time, beside a job."""
    source = random.Random(seed)
    d.submit(*commands)
    for one in asked:
        d.submit(one)
        for _ in range(source.randint(0, 2)):
            d.step()
    return d.run()
