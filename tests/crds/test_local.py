"""What is a directory's own: durable, one format, and one typed error where the file cannot be used now."""

from __future__ import annotations

import io
import sqlite3

import pytest
from backends import local_world
from hypothesis import given
from hypothesis import strategies as st

from coserve_api.errors import MessageError, ShardError
from coserve_contract.away import StoreAwayError
from coserve_contract.local.database import Database
from coserve_contract.local.rows import put
from coserve_contract.packed import pack, read_packed
from coserve_contract.shards import Sample, Shard
from coserve_contract.store import JobRecord

JOB = "job-1"


async def test_what_was_written_is_there_when_it_is_opened_again(tmp_path, messages) -> None:
    world = local_world(tmp_path)
    await world.start("one")
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    await world.a.take_lease(JOB, 1)
    await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(5))
    await world.store.push_shard(JOB, messages.shard(6))
    before = await world.store.job(JOB)
    await world.database.close()
    again = local_world(tmp_path)
    assert await again.store.job(JOB) == before
    assert (before.last_shard, await again.store.incarnation()) == (6, "one")
    await again.database.close()


async def test_it_is_on_the_disk_when_a_write_returns(tmp_path) -> None:
    database = Database(tmp_path / "coserve.db")
    mode, synchronous = await database.read(
        lambda db: (db.execute("PRAGMA journal_mode").fetchone()[0], db.execute("PRAGMA synchronous").fetchone()[0])
    )
    assert (mode, synchronous) == ("wal", 2)
    await database.close()


async def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, messages) -> None:
    world = local_world(tmp_path)

    def half(db: sqlite3.Connection) -> None:
        put(db, JOB, feed="{}")
        raise MessageError("key", "", "", "")

    with pytest.raises(MessageError):
        await world.database.write(half)
    assert await world.store.job(JOB) == JobRecord()
    await world.database.close()


async def test_a_locked_file_is_a_store_that_is_away(tmp_path, messages, monkeypatch) -> None:
    monkeypatch.setattr("coserve_contract.local.database.BUSY_S", 0.0)
    world = local_world(tmp_path)
    await world.start()
    other = sqlite3.connect(world.database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreAwayError, match=r"coserve\.db: database is locked"):
        await world.store.push_shard(JOB, messages.shard(1))
    other.execute("ROLLBACK")
    await world.store.push_shard(JOB, messages.shard(1))
    other.close()
    await world.database.close()


def test_a_file_of_another_format_is_left_alone(tmp_path) -> None:
    path = tmp_path / "coserve.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StoreAwayError, match="has format 9, and this program reads 1: use the program that wrote it"):
        Database(path)
    path.write_bytes(b"what is this?" * 99)
    with pytest.raises(StoreAwayError, match=r"coserve\.db: file is not a database"):
        Database(path)


async def test_a_message_that_does_not_read_is_named(tmp_path) -> None:
    world = local_world(tmp_path)
    await world.database.write(lambda db: put(db, JOB, progress="?", feed='{"samples":7}'))
    record = await world.store.job(JOB)
    assert record.feed is not None
    assert [error.key for error in record.broken] == ["job job-1: progress"]
    await world.database.close()


SHARD = Shard(3, 0, "0123456789abcdef" * 4, (Sample(1, (3, 2, 3), (0.0, 1.0, 1.0)), Sample(2, (4, 5), (0.0, 1.0))))


@given(st.integers(0, len(pack(SHARD)) - 1), st.integers(1, 255))
def test_a_wrong_byte_in_a_packed_shard_is_found(place, flip) -> None:
    packed = bytearray(pack(SHARD))
    assert read_packed(io.BytesIO(packed)) == SHARD
    packed[place] ^= flip
    with pytest.raises(ShardError):
        read_packed(io.BytesIO(packed))
