"""The feeders of a server: a process for each job that is fed, since rows are rendered by a program of the model's
author and tokenising must not hold up the server's loop. One that dies is started again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)

RETRIES = 6
"""Of a feeder that ends with an error, as a Kubernetes Job's."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
END_S = 5.0


@dataclass
class _Fed:
    """A job's feeder. `failures` are in a row."""

    settings: Mapping[str, str]
    process: Process | None = None
    failures: int = 0
    again_at_s: float = 0.0


class Feeders:
    """`keep` is called again and again with the jobs that are to be fed.

    Args:
        environment: what every feeder gets.
        now_s: a monotonic clock.
    """

    def __init__(self, environment: Mapping[str, str], now_s: Callable[[], float]) -> None:
        self._environment = environment
        self._now_s = now_s
        self._fed: dict[str, _Fed] = {}

    async def keep(self, wanted: Mapping[str, Mapping[str, str]]) -> None:
        """Feed these jobs, by uid with their settings, and no others."""
        for job in [job for job in self._fed if job not in wanted]:
            await self._end(self._fed.pop(job))
        for job, settings in wanted.items():
            fed = self._fed.setdefault(job, _Fed(settings))
            self._reap(job, fed)
            if fed.process is None and fed.failures <= RETRIES and self._now_s() >= fed.again_at_s:
                fed.process = await self._start(fed)

    def failed(self, job: str) -> str | None:
        """Why a job cannot be fed, once that was tried often enough."""
        fed = self._fed.get(job)
        if fed is None or fed.failures <= RETRIES:
            return None
        return f"its feeder ended {fed.failures} times in a row; the server's log says why"

    async def close(self) -> None:
        """End them all."""
        while self._fed:
            await self._end(self._fed.popitem()[1])

    def _reap(self, job: str, fed: _Fed) -> None:
        if fed.process is None or fed.process.returncode is None:
            return
        status, fed.process = fed.process.returncode, None
        fed.failures = fed.failures + 1 if status else 0
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(max(fed.failures - 1, 0), 10))
        fed.again_at_s = self._now_s() + wait_s
        if status:
            log.warning("job %s: its feeder ended with status %d, again in %g s", job, status, wait_s)

    async def _start(self, fed: _Fed) -> Process:
        program = (sys.executable, "-m", "coserve_agent.feeder")
        environment = {**self._environment, **fed.settings}
        # In a group of its own: a Ctrl-C in the terminal is the server's to act on.
        return await asyncio.create_subprocess_exec(*program, stdin=PIPE, env=environment, process_group=0)

    async def _end(self, fed: _Fed) -> None:
        process = fed.process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
