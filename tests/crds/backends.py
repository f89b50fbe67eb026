"""The two backends that keep the state of jobs, for tests of what both promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from coserve_contract.keys import agent_id
from coserve_contract.local.binder import LocalBinder
from coserve_contract.local.database import DATABASE, Database
from coserve_contract.local.fencing import LocalFencing
from coserve_contract.local.rows import put
from coserve_contract.local.store import LocalStore

REDIS, LOCAL = "redis", "local"
BOTH = pytest.mark.parametrize("world", [REDIS, LOCAL], indirect=True)
"""The test holds for either."""


@dataclass
class LocalWorld:
    """What a server and two agents hold in their hands, in a directory."""

    database: Database
    binder: LocalBinder
    store: LocalStore
    a: LocalFencing
    b: LocalFencing

    async def start(self, incarnation: str = "first") -> None:
        """The server has begun, and both agents know it."""
        await self.store.set_incarnation(incarnation)
        for agent in (self.a, self.b):
            agent.register(incarnation)

    async def expire(self, job: str) -> None:
        """Nobody has the lease any more."""
        await self.database.write(lambda db: put(db, job, owner=None))


def local_world(folder: Path) -> LocalWorld:
    """A database of its own, in `folder`."""
    database = Database(folder / DATABASE)
    a, b = (LocalFencing(database, agent_id(pod, "boot-1")) for pod in ("pod-a", "pod-b"))
    return LocalWorld(database, LocalBinder(database), LocalStore(database), a, b)
