"""A standalone job as it is kept: what was asked for, and what became of it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from coserve_agent.standalone.spec import LocalJobSpec
from coserve_contract.local.database import Database
from coserve_contract.message import Message, Part
from coserve_contract.messages import AdapterFiles, Checkpoint, Start


class State(StrEnum):
    """Where a job is; the last three are for good."""

    QUEUED = "Queued"
    PREPARING = "Preparing"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    COMPLETED = "Completed"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class Faults(Part):
    """What ended attempts since the checkpoint of `step`: `failures` of them count towards backoffLimit. The next
    begins at `until_s`.
    """

    attempts: int
    failures: int
    step: int
    reason: str
    message: str
    until_s: float


class Ended(Part):
    """How it ended, and when."""

    state: State
    reason: str = ""
    message: str = ""
    at_s: float
    adapter: AdapterFiles | None = None


class Job(Message):
    """`number` is that of the adapter's version that it will publish, `begun_s` when it was first bound or last
    resumed. Times in seconds since 1970.
    """

    name: str
    uid: str
    created_s: float
    spec: LocalJobSpec
    number: Annotated[int, Field(ge=1)]
    start: Start | None = None
    resume: Checkpoint | None = None
    suspended: bool = False
    cancelled: bool = False
    deleted: bool = False
    begun_s: float | None = None
    restarts: int = 0
    faults: Faults | None = None
    ended: Ended | None = None

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.created_s, UTC)

    def dumps(self) -> str:
        """With each None: one among the template's variables means something."""
        return self.model_dump_json()


@dataclass(frozen=True)
class JobTable:
    """All jobs of a directory."""

    database: Database

    async def all(self) -> list[Job]:
        """MessageError where one does not read."""
        statement = "SELECT name, message FROM finetune_job"
        rows = await self.database.read(lambda db: db.execute(statement).fetchall())
        return [Job.loads(f"finetune_job {name}", raw) for name, raw in rows]

    async def put(self, job: Job) -> None:
        """Keep it as it is now."""
        statement = (
            "INSERT INTO finetune_job VALUES (?, ?, ?) ON CONFLICT (uid) DO UPDATE SET message = excluded.message"
        )
        await self.database.write(lambda db: db.execute(statement, (job.uid, job.name, job.dumps())))

    async def delete(self, uid: str) -> None:
        """Keep it no more."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM finetune_job WHERE uid = ?", (uid,))

        await self.database.write(work)
