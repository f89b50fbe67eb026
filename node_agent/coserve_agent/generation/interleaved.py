"""The pieces of several generations in one order: as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from coserve_agent.concurrency import end
from coserve_agent.generation.generation import Generation, Piece


async def interleaved(generations: list[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """Each with the number of its generation, until all are done."""
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
