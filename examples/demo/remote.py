"""The measuring client as seen from the process that started it: what it has said so far."""

from __future__ import annotations

import asyncio
import json
import sys
from types import TracebackType

from demo.client import READY, News, Work
from demo.cluster import DemoError
from demo.replay import Sample

LINE_BYTES = 1 << 24
"""The longest line that a client may say: a second of all its streams."""


class RemoteClient:
    """A client process, used as a context. While `run` lasts, `samples` grow once a second, and `stalls`: the times in
    which it stood still itself.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.samples: list[Sample] = []
        self.stalls: list[tuple[float, float]] = []

    async def __aenter__(self) -> RemoteClient:
        """Start it, and wait until it can begin. Raises DemoError if it cannot."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "demo.client"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._input.write(self._work.to_json().encode() + b"\n")
        if (await self._output.readline()).strip() != READY.encode():
            raise self._failed()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def run(self, started_s: float) -> None:
        """Let it do its work, which begins at `started_s`, until its end. Raises DemoError if that fails."""
        self._input.write(f"{started_s!r}\n".encode())
        async for line in self._output:
            News.apply(json.loads(line), self.samples, self.stalls)
        if await self._process.wait() != 0:
            raise self._failed()

    def _failed(self) -> DemoError:
        return DemoError("the measuring client did not do its work; its error stands above")
