"""One SQLite file that is written by a server and its feeders: a transaction a write, durable when it has returned."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from coserve_contract.away import StoreAwayError

T = TypeVar("T")
DATABASE = "coserve.db"
"""The file's name in a directory."""
FORMAT = 1
"""PRAGMA user_version of a file that this program reads."""
BUSY_S = 5.0
"""How long one waits for another process' transaction."""

_TABLES = """
CREATE TABLE IF NOT EXISTS endpoint (one INTEGER PRIMARY KEY CHECK (one = 1), incarnation TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS job (
  uid TEXT PRIMARY KEY, epoch INTEGER, agent TEXT NOT NULL DEFAULT '', owner TEXT,
  checkpoint TEXT, progress TEXT, result TEXT, feed TEXT
);
CREATE TABLE IF NOT EXISTS binding (agent TEXT, job TEXT, message TEXT NOT NULL, PRIMARY KEY (agent, job));
CREATE TABLE IF NOT EXISTS adapter (name TEXT PRIMARY KEY, message TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shard (
  job TEXT, stream TEXT, number INTEGER, packed BLOB NOT NULL, PRIMARY KEY (job, stream, number)
);
CREATE TABLE IF NOT EXISTS finetune_job (uid TEXT PRIMARY KEY, name TEXT UNIQUE NOT NULL, message TEXT NOT NULL);
"""


class Database:
    """An open file. Its one thread does one transaction after the other.

    Raises:
        StoreAwayError: the file cannot be opened, or is none that this program reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            self._connection = self._thread.submit(self._open).result()
        except sqlite3.Error as error:
            raise StoreAwayError(f"{path}: {error}") from None

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found not in (0, FORMAT):
            connection.close()
            raise StoreAwayError(
                f"{self.path} has format {found}, and this program reads {FORMAT}: use the program that wrote it, or "
                "another directory"
            )
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
        return connection

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work` in a transaction of its own. When this returns, it is on the disk.

        Raises:
            StoreAwayError: nothing was written.
        """
        return await self._do(lambda: self._transaction("BEGIN IMMEDIATE", work))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work`, which sees one moment."""
        return await self._do(lambda: self._transaction("BEGIN", work))

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _transaction(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        try:
            connection.execute(begin)
            try:
                result = work(connection)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StoreAwayError(f"{self.path}: {error}") from None
        return result

    async def close(self) -> None:
        """Wait for what is under way, and let go of the file."""
        await self._do(self._connection.close)
        self._thread.shutdown()
