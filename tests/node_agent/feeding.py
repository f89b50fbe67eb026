"""What the tests of the feeder do: prepare its material, run it, and play the agent that reads."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from data_rows import renderer_of

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.concurrency import end
from coserve_agent.data.material import Material
from coserve_agent.feeder import Feeder
from coserve_agent.settings import FeederSettings
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.shards import Shard
from coserve_contract.store import Store

JOB = "job-1"
KEYS = Keys("endpoint-1")


def prepared(tokenizer: Tokenizer, variables: dict[str, object], **changes: object) -> Material:
    settings = FeederSettings(**variables | changes)  # type: ignore[arg-type]
    return Material.prepare(settings, renderer_of(tokenizer), tokenizer.size)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


def lines(path: Path) -> str:
    return path.read_text()


def write(path: Path, text: str | None) -> None:
    """None is no file at all."""
    path.unlink()
    if text is not None:
        path.write_text(text)


async def accept(store: Store, cursor: int) -> None:
    """What the accept script leaves."""
    checkpoint = {
        "version": 1,
        "step": cursor,
        "cursor": cursor,
        "epoch": 1,
        "path": "jobs/x/e1/s1",
        "sha256": "0" * 64,
    }
    await command(store.redis, "SET", KEYS.checkpoint(JOB), json.dumps(checkpoint))
    await command(store.redis, "XTRIM", KEYS.shards(JOB), "MINID", f"{cursor + 1}-0")


async def read(store: Store, after: int, count: int = 100) -> list[Shard]:
    return await store.read_shards(JOB, after, count)


class Task:
    """A running feeder."""

    def __init__(self, store: Store, material: Material) -> None:
        self.task = asyncio.create_task(Feeder(store, JOB, material).run())

    async def __aenter__(self) -> asyncio.Task[None]:
        return self.task

    async def __aexit__(self, *error: object) -> None:
        await end(self.task)


async def has(store: Store, last: int) -> bool:
    return (await store.job(JOB)).last_shard == last


async def finished(store: Store) -> bool:
    status = await store.feed(JOB)
    return status is not None and status.finished


async def refusal(store: Store, words: str) -> str:
    """The reason of what the feeder says, in words like these."""
    status = await store.feed(JOB)
    assert status is not None
    assert status.error is not None
    assert re.search(words, status.error.message), status.error.message
    return status.error.reason
