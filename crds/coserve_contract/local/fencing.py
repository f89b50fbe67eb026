"""`scripts.Fencing`, of one directory's database: what is compared, and in which order, is what the scripts compare."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from coserve_contract.local.database import Database
from coserve_contract.local.rows import HELD_OUT, TRAINING, drop, first, key, put, said
from coserve_contract.messages import Checkpoint, Completed, Failed, Progress, Released
from coserve_contract.scripts import LEASE_TTL_MS, Lease, Reason, Refused

T = TypeVar("T")


@dataclass
class LocalFencing:
    """An agent's side. A lease never runs out; `lease_ttl_ms` is how long its holder believes in it without asking."""

    database: Database
    agent: str
    lease_ttl_ms: int = LEASE_TTL_MS
    incarnation: str = field(default="", init=False)

    def register(self, incarnation: str) -> None:
        """Go on under `incarnation`."""
        self.incarnation = incarnation

    async def take_lease(self, job: str, epoch: int) -> Lease | Refused:
        """As in `scripts.Fencing`; MessageError where the checkpoint does not read."""

        def work(db: sqlite3.Connection) -> Lease | Refused:
            refused = self._refused(db, job, epoch, needs_lease=False)
            if refused is not None:
                return refused
            if said(db, job, "result") is not None:
                return Refused(Reason.FINISHED, epoch)
            accepted = _checkpoint(db, job)
            put(db, job, owner=self._owner(epoch))
            drop(db, job, TRAINING, accepted.cursor if accepted else 0)
            return Lease(accepted)

        return await self.database.write(work)

    async def renew_lease(self, job: str, epoch: int) -> Refused | None:
        """Whether it is still held."""
        return await self.database.read(lambda db: self._refused(db, job, epoch))

    async def report_progress(self, job: str, progress: Progress) -> Refused | None:
        """As in `scripts.Fencing`."""

        def work(db: sqlite3.Connection) -> None:
            put(db, job, progress=progress.dumps())
            kept = progress.eval_cursor
            if kept is not None:
                drop(db, job, HELD_OUT, kept)
                if first(db, job, HELD_OUT) not in (None, kept + 1):
                    drop(db, job, HELD_OUT)

        return await self._fenced(job, progress.epoch, work)

    async def accept_checkpoint(self, job: str, epoch: int, checkpoint: Checkpoint) -> Refused | None:
        """As in `scripts.Fencing`."""

        def work(db: sqlite3.Connection) -> Refused | None:
            old = _checkpoint(db, job)
            if old is not None and (old.step > checkpoint.step or old.cursor > checkpoint.cursor):
                return Refused(Reason.BEHIND, epoch, str(old.step))
            put(db, job, checkpoint=checkpoint.dumps())
            drop(db, job, TRAINING, checkpoint.cursor)
            return None

        return await self._fenced(job, epoch, work)

    async def rewind(self, job: str, epoch: int, checkpoint: Checkpoint | None) -> Refused | None:
        """As in `scripts.Fencing`."""

        def work(db: sqlite3.Connection) -> Refused | None:
            old = _checkpoint(db, job)
            if old is None:
                return Refused(Reason.BEHIND, epoch, "0")
            if checkpoint is not None and checkpoint.step >= old.step:
                return Refused(Reason.BEHIND, epoch, str(old.step))
            put(db, job, checkpoint=None if checkpoint is None else checkpoint.dumps(), progress=None)
            drop(db, job, TRAINING)
            drop(db, job, HELD_OUT)
            return None

        return await self._fenced(job, epoch, work)

    async def finish(self, job: str, result: Completed | Failed | Released) -> Refused | None:
        """As in `scripts.Fencing`."""

        def work(db: sqlite3.Connection) -> Refused | None:
            if said(db, job, "result") == result.dumps():
                return None
            refused = self._refused(db, job, result.epoch)
            if refused is not None:
                return refused
            put(db, job, result=result.dumps(), owner=None)
            if not isinstance(result, Released):
                drop(db, job, TRAINING)
                drop(db, job, HELD_OUT)
            return None

        return await self.database.write(work)

    def _owner(self, epoch: int) -> str:
        return f"{self.agent}:{epoch}"

    async def _fenced(
        self, job: str, epoch: int, work: Callable[[sqlite3.Connection], Refused | None]
    ) -> Refused | None:
        return await self.database.write(lambda db: self._refused(db, job, epoch) or work(db))

    def _refused(self, db: sqlite3.Connection, job: str, epoch: int, needs_lease: bool = True) -> Refused | None:
        """Why this agent may not write for the job under `epoch`, if it may not."""
        row = db.execute("SELECT epoch, agent, owner FROM job WHERE uid = ?", (job,)).fetchone()
        fenced, agent, owner = row or (None, "", None)
        (incarnation,) = db.execute("SELECT incarnation FROM endpoint").fetchone() or ("",)
        if fenced is None:
            return Refused(Reason.NO_FENCE)
        if fenced != epoch:
            return Refused(Reason.STALE_EPOCH, fenced, agent)
        if agent != self.agent:
            return Refused(Reason.NOT_OWNER, fenced, agent)
        if incarnation != self.incarnation:
            return Refused(Reason.INCARNATION, fenced, incarnation)
        if needs_lease and owner != self._owner(epoch):
            return Refused(Reason.LOST_LEASE, fenced, agent)
        return None


def _checkpoint(db: sqlite3.Connection, job: str) -> Checkpoint | None:
    """MessageError where it does not read."""
    raw = said(db, job, "checkpoint")
    return None if raw is None else Checkpoint.loads(key(job, "checkpoint"), raw)
