"""A job's row as typed messages, and its shards by number."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from coserve_api.errors import MessageError
from coserve_contract.messages import Checkpoint, FeedStatus, Progress, load_result
from coserve_contract.scripts import Fence
from coserve_contract.store import JobRecord

T = TypeVar("T")
TRAINING, HELD_OUT = "shards", "eval"
_COLUMNS = "epoch, agent, owner, checkpoint, progress, result, feed"


def key(job: str, what: str) -> str:
    """How messages that do not read are named."""
    return f"job {job}: {what}"


def record_of(db: sqlite3.Connection, job: str) -> JobRecord:
    """All that is known of a job; messages that do not read are absent, and in `broken`."""
    row = db.execute(f"SELECT {_COLUMNS} FROM job WHERE uid = ?", (job,)).fetchone()
    if row is None:
        row = (None, "", None, None, None, None, None)
    epoch, agent, owner, checkpoint, progress, result, feed = row
    broken: list[MessageError] = []

    def read(load: Callable[[str, Any], T], what: str, raw: str | None) -> T | None:
        try:
            return None if raw is None else load(key(job, what), raw)
        except MessageError as error:
            broken.append(error)
            return None

    accepted = read(Checkpoint.loads, "checkpoint", checkpoint)
    held, held_out = count(db, job, TRAINING), count(db, job, HELD_OUT)
    return JobRecord(
        fence=None if epoch is None else Fence(epoch, agent),
        owner=owner,
        checkpoint=accepted,
        progress=read(Progress.loads, "progress", progress),
        result=read(load_result, "result", result),
        feed=read(FeedStatus.loads, "feed", feed),
        last_shard=(accepted.cursor if accepted else 0) + held,
        streamed=held + held_out,
        broken=tuple(broken),
    )


def put(db: sqlite3.Connection, job: str, **values: str | int | None) -> None:
    """Set columns of a job's row, which is made where there is none."""
    db.execute("INSERT INTO job (uid) VALUES (?) ON CONFLICT DO NOTHING", (job,))
    assigned = ", ".join(f"{name} = :{name}" for name in values)
    db.execute(f"UPDATE job SET {assigned} WHERE uid = :uid", {**values, "uid": job})


def said(db: sqlite3.Connection, job: str, column: str) -> str | None:
    """What stands in a column of a job's row."""
    row = db.execute(f"SELECT {column} FROM job WHERE uid = ?", (job,)).fetchone()
    return None if row is None else row[0]


def count(db: sqlite3.Connection, job: str, stream: str) -> int:
    """How many shards a stream holds."""
    (found,) = db.execute("SELECT COUNT(*) FROM shard WHERE job = ? AND stream = ?", (job, stream)).fetchone()
    return int(found)


def first(db: sqlite3.Connection, job: str, stream: str) -> int | None:
    """The number of a stream's first shard."""
    (found,) = db.execute("SELECT MIN(number) FROM shard WHERE job = ? AND stream = ?", (job, stream)).fetchone()
    return None if found is None else int(found)


def drop(db: sqlite3.Connection, job: str, stream: str, up_to: int | None = None) -> None:
    """Delete a stream's shards up to a number, or all."""
    if up_to is None:
        db.execute("DELETE FROM shard WHERE job = ? AND stream = ?", (job, stream))
    else:
        db.execute("DELETE FROM shard WHERE job = ? AND stream = ? AND number <= ?", (job, stream, up_to))
