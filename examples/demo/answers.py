"""Base and adapter side by side on held-out questions: how many answers are valid JSON, and how many are right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import openai
from gsm8k import Problem


@dataclass(frozen=True)
class Score:
    """Of `total` greedy answers: `valid` have the job's JSON form, `correct` the right number in it."""

    total: int
    valid: int
    correct: int
    first: str


def is_valid(text: str) -> tuple[bool, int | None]:
    """Whether `text` is the job's JSON, {"steps": [strings], "answer": number}, and its answer."""
    try:
        value = json.loads(text)
    except ValueError:
        return False, None
    if not isinstance(value, dict) or set(value) != {"steps", "answer"}:
        return False, None
    steps, answer = value["steps"], value["answer"]
    good = isinstance(steps, list) and all(isinstance(step, str) for step in steps) and isinstance(answer, int)
    return good, answer if good else None


async def ask(client: openai.AsyncOpenAI, model: str, problems: Sequence[Problem], max_tokens: int = 192) -> Score:
    """Ask every question greedily, all at once, without constrained decoding."""

    async def answer(problem: Problem) -> str:
        reply = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": problem.question}],
            temperature=0,
            max_tokens=max_tokens,
        )
        return reply.choices[0].message.content or ""

    texts = await asyncio.gather(*map(answer, problems))
    judged = list(map(is_valid, texts))
    valid = sum(good for good, _ in judged)
    correct = sum(number == problem.answer for (_, number), problem in zip(judged, problems, strict=True))
    return Score(len(problems), valid, correct, texts[0])
