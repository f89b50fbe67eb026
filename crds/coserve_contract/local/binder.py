"""`scripts.Binder`, of one directory's database: the server's own side, under its lock."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from coserve_contract.local.database import Database
from coserve_contract.local.rows import HELD_OUT, TRAINING, drop, put, record_of
from coserve_contract.messages import Binding, Released
from coserve_contract.scripts import Reason, Refused


@dataclass(frozen=True)
class LocalBinder:
    """Who may run a job."""

    database: Database

    async def bind(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """As in `scripts.Binder`. Refused: stale_epoch, finished."""

        def work(db: sqlite3.Connection) -> Refused | None:
            record = record_of(db, job)
            fence, known, resume = record.fence, record.checkpoint, binding.resume
            if not isinstance(record.result, Released | None):
                return Refused(Reason.FINISHED, fence.epoch if fence else None, fence.agent if fence else "")
            if fence is not None and fence.epoch >= binding.epoch:
                return Refused(Reason.STALE_EPOCH, fence.epoch, fence.agent)
            if resume is not None and (known is None or known.step < resume.step):
                put(db, job, checkpoint=resume.dumps())
                drop(db, job, TRAINING, resume.cursor)
            if fence is not None:
                drop(db, job, HELD_OUT)
            put(db, job, epoch=binding.epoch, agent=agent, owner=None, result=None)
            _tell(db, job, agent, binding)
            return None

        return await self.database.write(work)

    async def rebrief(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """As in `scripts.Binder`. Refused: no_fence, stale_epoch, not_owner."""

        def work(db: sqlite3.Connection) -> Refused | None:
            refused = _not_bound(db, job, (agent,), binding.epoch)
            if refused is None:
                _tell(db, job, agent, binding)
            return refused

        return await self.database.write(work)

    async def unbind(self, job: str, agent: str, epoch: int) -> Refused | None:
        """As in `scripts.Binder`. Refused: no_fence, stale_epoch, not_owner."""

        def work(db: sqlite3.Connection) -> Refused | None:
            refused = _not_bound(db, job, (agent, ""), epoch)
            if refused is None:
                put(db, job, agent="", owner=None)
                db.execute("DELETE FROM binding WHERE agent = ? AND job = ?", (agent, job))
            return refused

        return await self.database.write(work)


def _tell(db: sqlite3.Connection, job: str, agent: str, binding: Binding) -> None:
    db.execute("DELETE FROM binding WHERE job = ?", (job,))
    db.execute("INSERT INTO binding VALUES (?, ?, ?)", (agent, job, binding.dumps()))


def _not_bound(db: sqlite3.Connection, job: str, agents: tuple[str, ...], epoch: int) -> Refused | None:
    fence = record_of(db, job).fence
    if fence is None:
        return Refused(Reason.NO_FENCE)
    if fence.epoch != epoch:
        return Refused(Reason.STALE_EPOCH, fence.epoch, fence.agent)
    if fence.agent not in agents:
        return Refused(Reason.NOT_OWNER, fence.epoch, fence.agent)
    return None
