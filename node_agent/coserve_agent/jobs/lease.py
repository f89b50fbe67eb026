"""The right to write for a job: kept alive, and never believed longer than this machine's clock can vouch for.

Without it the job computes on, but nothing is accepted. It goes on once the lease is back, and ends when the fence
has moved on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from coserve_agent.errors import FencedError
from coserve_api.errors import MessageError
from coserve_contract.away import STORE_AWAY
from coserve_contract.messages import Checkpoint
from coserve_contract.protocols import JobFencing
from coserve_contract.scripts import Lease, Reason, Refused

log = logging.getLogger(__name__)

# Redis's clock may run a little faster than ours: the lease is not used in its last tenth.
MARGIN = 0.1
RETRY_S = 0.5
MAX_RETRY_S = 5.0

_FINAL = (Reason.STALE_EPOCH, Reason.NOT_OWNER, Reason.FINISHED)


class LeaseKeeper:
    """One job's lease under one epoch. `run` keeps it; `write` does a fenced write as soon as it is held.

    Args:
        now_s, sleep: a monotonic clock and how to wait on it.
    """

    def __init__(
        self,
        fencing: JobFencing,
        job: str,
        epoch: int,
        *,
        now_s: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._fencing = fencing
        self._job = job
        self._epoch = epoch
        self._now_s = now_s
        self._sleep = sleep
        self._ttl_s = fencing.lease_ttl_ms / 1000
        self._until_s = float("-inf")
        self._taken = False
        self._extended = asyncio.Event()
        self._complaint = ""

    @property
    def held(self) -> bool:
        """Whether the lease is surely ours now."""
        return self._now_s() < self._until_s - MARGIN * self._ttl_s

    async def take(self) -> Checkpoint | None:
        """Take the lease, waiting for Redis as long as it takes; returns the accepted checkpoint.

        Raises:
            FencedError: the job is another's, or over.
        """
        while True:
            sent_s = self._now_s()
            reply = await self._try(lambda: self._fencing.take_lease(self._job, self._epoch))
            if isinstance(reply, Lease):
                self._extend(sent_s)
                return reply.checkpoint
            if reply is not None:
                self._refused(reply)
            await self._sleep(RETRY_S)

    async def run(self) -> None:
        """Renew at a third of the time to live, for ever. Raises FencedError when the job is lost."""
        while True:
            await self._sleep(self._ttl_s / 3 if self._taken else RETRY_S)
            sent_s = self._now_s()
            if self._taken:
                reply = await self._try(lambda: self._fencing.renew_lease(self._job, self._epoch), sent_s)
            else:
                reply = await self._try(lambda: self._fencing.take_lease(self._job, self._epoch), sent_s)
            if isinstance(reply, Refused):
                self._refused(reply)

    async def write(self, send: Callable[[], Awaitable[Refused | None]]) -> Refused | None:
        """Do a fenced write, again and again until Redis took it. Returns a refusal that says Redis knows better
        (behind).

        Raises:
            FencedError: the job is another's, or over.
        """
        wait_s = RETRY_S
        while True:
            await self._until_held()
            try:
                reply = await send()
            except STORE_AWAY as error:
                self._complain(error)
                await self._sleep(wait_s * random.uniform(0.8, 1.2))
                wait_s = min(2 * wait_s, MAX_RETRY_S)
                continue
            if reply is None or reply.reason is Reason.BEHIND:
                return reply
            self._refused(reply)

    async def write_now(self, send: Callable[[], Awaitable[Refused | None]]) -> None:
        """Do a fenced write if that is possible now; for what is written again anyway. Raises FencedError."""
        if not self.held:
            return
        try:
            reply = await send()
        except STORE_AWAY as error:
            self._complain(error)
            return
        if reply is not None and reply.reason is not Reason.BEHIND:
            self._refused(reply)

    async def _until_held(self) -> None:
        while not self.held:
            self._extended.clear()
            await self._extended.wait()

    def _extend(self, sent_s: float) -> None:
        """A request that was sent then was granted: the time to live began at that moment or later."""
        self._until_s = sent_s + self._ttl_s
        self._taken = True
        self._complaint = ""
        self._extended.set()

    async def _try(
        self, call: Callable[[], Awaitable[Lease | Refused | None]], sent_s: float | None = None
    ) -> Lease | Refused | None:
        """The reply, or None if Redis could not be asked. With `sent_s`, a success extends the lease from then."""
        try:
            reply = await call()
        except (*STORE_AWAY, MessageError) as error:
            self._complain(error)
            return None
        if sent_s is not None and not isinstance(reply, Refused):
            self._extend(sent_s)
        return reply

    def _refused(self, reply: Refused) -> None:
        """Raise if the refusal is final; else the lease must be taken again."""
        if reply.reason in _FINAL:
            self._until_s = float("-inf")
            raise FencedError(f"job {self._job}, epoch {self._epoch}: {reply}")
        self._taken = False
        self._until_s = float("-inf")
        self._complain(reply)

    def _complain(self, error: object) -> None:
        text = str(error)
        if text != self._complaint:
            self._complaint = text
            log.warning("job %s: no lease for now, nothing is accepted meanwhile: %s", self._job, text)
