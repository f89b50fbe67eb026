"""`store.Store`, of one directory's database."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from coserve_api.errors import MessageError, ShardError
from coserve_contract.local.database import Database
from coserve_contract.local.rows import HELD_OUT, TRAINING, count, drop, first, key, put, record_of, said
from coserve_contract.message import loaded
from coserve_contract.messages import AdapterRecord, Binding, Checkpoint, FeedStatus
from coserve_contract.packed import pack, read_packed
from coserve_contract.shards import Shard
from coserve_contract.store import SHARD_BOUND, JobRecord, Push, Pushed


@dataclass(frozen=True)
class LocalStore:
    """What server and feeders read, and what has one writer anyway."""

    database: Database

    async def incarnation(self) -> str | None:
        """That of the server's start."""
        row = await self.database.read(lambda db: db.execute("SELECT incarnation FROM endpoint").fetchone())
        return None if row is None else str(row[0])

    async def set_incarnation(self, value: str) -> None:
        """Server: who wrote under another may write no more."""
        statement = "INSERT INTO endpoint VALUES (1, ?) ON CONFLICT DO UPDATE SET incarnation = excluded.incarnation"
        await self.database.write(lambda db: db.execute(statement, (value,)))

    async def published(self) -> tuple[dict[str, AdapterRecord], tuple[MessageError, ...]]:
        """The versions to serve, by name, and those that do not read."""
        rows = await self.database.read(lambda db: db.execute("SELECT name, message FROM adapter").fetchall())
        return loaded(AdapterRecord.loads, ((name, f"adapter {name}", raw) for name, raw in rows))

    async def set_adapters(self, records: Iterable[AdapterRecord]) -> None:
        """Server: these are the published versions, and no others."""
        rows = [(record.name, record.dumps()) for record in records]

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM adapter")
            db.executemany("INSERT INTO adapter VALUES (?, ?)", rows)

        await self.database.write(work)

    async def bindings(self, agent: str) -> tuple[dict[str, Binding], tuple[MessageError, ...]]:
        """What `agent` should run, by job uid, and the bindings that do not read."""
        statement = "SELECT job, message FROM binding WHERE agent = ?"
        rows = await self.database.read(lambda db: db.execute(statement, (agent,)).fetchall())
        return loaded(Binding.loads, ((job, f"binding of {job}", raw) for job, raw in rows))

    # ---- a job ----

    async def job(self, job: str) -> JobRecord:
        """All that is known of a job, at one moment."""
        return await self.database.read(lambda db: record_of(db, job))

    async def job_uids(self) -> frozenset[str]:
        """Jobs with something here."""
        rows = await self.database.read(lambda db: db.execute("SELECT uid FROM job").fetchall())
        return frozenset(uid for (uid,) in rows)

    async def delete_job(self, job: str) -> None:
        """Server: nothing of it stays."""

        def work(db: sqlite3.Connection) -> None:
            for table, column in (("job", "uid"), ("binding", "job"), ("shard", "job")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (job,))

        await self.database.write(work)

    async def clear_streams(self, job: str) -> None:
        """Server: nobody reads the job's shards, and they may be pushed again."""
        await self.database.write(lambda db: db.execute("DELETE FROM shard WHERE job = ?", (job,)))

    # ---- shards ----

    async def feed(self, job: str) -> FeedStatus | None:
        """What the feeder knows of the data."""
        raw = await self.database.read(lambda db: said(db, job, "feed"))
        return None if raw is None else FeedStatus.loads(key(job, "feed"), raw)

    async def set_feed(self, job: str, status: FeedStatus) -> None:
        """Feeder: say what is known of the data."""
        await self.database.write(lambda db: put(db, job, feed=status.dumps()))

    async def push_shard(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed:
        """Feeder: as in `store.Store`."""
        return await self.database.write(partial(_push_training, job=job, shard=shard, bound=bound))

    async def push_eval(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed:
        """Feeder: as in `store.Store`."""
        return await self.database.write(partial(_push_eval, job=job, shard=shard, bound=bound))

    async def read_shards(self, job: str, after: int, count: int = 1) -> list[Shard]:
        """As in `store.Store`."""
        return await self._read(job, TRAINING, after, count)

    async def read_eval(self, job: str, after: int = 0, count: int = 16) -> list[Shard]:
        """As in `store.Store`."""
        return await self._read(job, HELD_OUT, after, count)

    async def _read(self, job: str, stream: str, after: int, count: int) -> list[Shard]:
        statement = (
            "SELECT number, packed FROM shard WHERE job = ? AND stream = ? AND number > ? ORDER BY number LIMIT ?"
        )
        arguments = (job, stream, after, count)
        shards: list[Shard] = []
        for number, packed in await self.database.read(lambda db: db.execute(statement, arguments).fetchall()):
            shard, following = read_packed(io.BytesIO(packed)), after + len(shards) + 1
            if not shard.seq == number == following:
                raise ShardError("seq", f"is {shard.seq} under the number {number}, and {following} is next")
            shards.append(shard)
        return shards


def _push_training(db: sqlite3.Connection, job: str, shard: Shard, bound: int) -> Pushed:
    """The stream holds cursor+1, cursor+2, ... of the accepted checkpoint's cursor, without a gap."""
    record = record_of(db, job)
    raw = said(db, job, "checkpoint")
    cursor = 0 if raw is None else Checkpoint.loads(key(job, "checkpoint"), raw).cursor
    read = record.progress.cursor if record.progress else 0
    return _push(db, job, TRAINING, shard, cursor, max(cursor, read) + bound)


def _push_eval(db: sqlite3.Connection, job: str, shard: Shard, bound: int) -> Pushed:
    """The stream holds cursor+1, cursor+2, ... of what the bound agent says it keeps itself."""
    record = record_of(db, job)
    fence, progress = record.fence, record.progress
    bound_now = fence is not None and progress is not None and progress.epoch == fence.epoch
    kept = (progress.eval_cursor if bound_now and progress is not None else 0) or 0
    if first(db, job, HELD_OUT) not in (None, kept + 1):
        drop(db, job, HELD_OUT)
    return _push(db, job, HELD_OUT, shard, kept, kept + bound)


def _push(db: sqlite3.Connection, job: str, stream: str, shard: Shard, cursor: int, room: int) -> Pushed:
    last = cursor + count(db, job, stream)
    if shard.seq <= last:
        return Pushed(Push.PRESENT, last)
    if shard.seq > last + 1:
        return Pushed(Push.GAP, last)
    if shard.seq > room:
        return Pushed(Push.FULL, last)
    db.execute("INSERT INTO shard VALUES (?, ?, ?, ?)", (job, stream, shard.seq, pack(shard)))
    return Pushed(Push.ADDED, shard.seq)
