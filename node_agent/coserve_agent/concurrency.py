"""Structured concurrency that asyncio lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_AGAIN_S = 0.1


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended.

    Again and again: before Python 3.12 asyncio.wait_for, which redis uses, can swallow a cancellation. For the same
    reason this does not stop half-way when it is cancelled itself.
    """
    pending, cancelled = {task for task in tasks if not task.done()}, False
    while pending:
        for task in pending:
            task.cancel()
        try:
            _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: nobody else will
    if cancelled:
        raise asyncio.CancelledError


async def alongside(main: Coroutine[Any, Any, T], *background: Coroutine[Any, Any, None]) -> T:
    """The result of `main`. The others run meanwhile and may end early; an error of theirs ends everything."""
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
        await end(first, *others)
