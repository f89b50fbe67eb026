"""What every process of ours does: run several things until the first of them ends, and stop when told to."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

CANCEL_EVERY_S = 1.0


async def first_of(*parts: Coroutine[Any, Any, Any]) -> int:
    """Run all parts until one ends, then end the others; return which one ended, or raise its error."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(tasks)
    first = next(task for task in tasks if task in done)
    first.result()
    return tasks.index(first)


async def _end(tasks: "list[asyncio.Task[Any]]") -> None:
    """Cancel until all are done: before Python 3.12 asyncio.wait_for may swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_EVERY_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen; only the first one's counts


@asynccontextmanager
async def serving(
    application: web.Application, port: int, context: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Answer on the port meanwhile, over TLS where there is a context."""
    server = web.AppRunner(application, access_log=None)
    await server.setup()
    try:
        await web.TCPSite(server, port=port, ssl_context=context).start()
        yield
    finally:
        await server.cleanup()


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """Set the event at SIGTERM or SIGINT."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        yield stopped
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
