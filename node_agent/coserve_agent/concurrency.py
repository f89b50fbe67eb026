"""One piece of structured concurrency that asyncio lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def alongside(main: Coroutine[Any, Any, T], *background: Coroutine[Any, Any, None]) -> T:
    """The result of `main`. The others run meanwhile, may end early, and are cancelled when it is done; an error of theirs ends it."""
    first = asyncio.create_task(main)
    others = {asyncio.create_task(one) for one in background}
    try:
        while not first.done():
            done, _ = await asyncio.wait({first, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & others:
                others.discard(task)
                task.result()
        return first.result()
    finally:
        for task in (first, *others):
            task.cancel()
        await asyncio.gather(first, *others, return_exceptions=True)
