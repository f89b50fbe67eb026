"""What agents and feeders ask of the store of jobs, so that they need not know which backend keeps it: Redis
(`store`, `scripts`), or a directory (`local`).

All methods may raise what `away.STORE_AWAY` names: the store cannot be reached now.
"""

from __future__ import annotations

from typing import Protocol

from coserve_api.errors import MessageError
from coserve_contract.messages import (
    AdapterRecord,
    Binding,
    Checkpoint,
    Completed,
    Failed,
    FeedStatus,
    Progress,
    Released,
)
from coserve_contract.scripts import Lease, Refused
from coserve_contract.shards import Shard
from coserve_contract.store import SHARD_BOUND, JobRecord, Pushed


class JobStore(Protocol):
    """What is read, and what has one writer anyway; `store.Store` says what each does."""

    async def incarnation(self) -> str | None: ...

    async def published(self) -> tuple[dict[str, AdapterRecord], tuple[MessageError, ...]]: ...

    async def bindings(self, agent: str) -> tuple[dict[str, Binding], tuple[MessageError, ...]]: ...

    async def job(self, job: str) -> JobRecord: ...

    async def feed(self, job: str) -> FeedStatus | None: ...

    async def set_feed(self, job: str, status: FeedStatus) -> None: ...

    async def push_shard(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed: ...

    async def push_eval(self, job: str, shard: Shard, bound: int = SHARD_BOUND) -> Pushed: ...

    async def read_shards(self, job: str, after: int, count: int = 1) -> list[Shard]: ...

    async def read_eval(self, job: str, after: int = 0, count: int = 16) -> list[Shard]: ...


class JobFencing(Protocol):
    """What an agent writes under its lease; `scripts.Fencing` says what each does."""

    @property
    def lease_ttl_ms(self) -> int: ...

    @property
    def incarnation(self) -> str: ...

    async def take_lease(self, job: str, epoch: int) -> Lease | Refused: ...

    async def renew_lease(self, job: str, epoch: int) -> Refused | None: ...

    async def report_progress(self, job: str, progress: Progress) -> Refused | None: ...

    async def accept_checkpoint(self, job: str, epoch: int, checkpoint: Checkpoint) -> Refused | None: ...

    async def rewind(self, job: str, epoch: int, checkpoint: Checkpoint | None) -> Refused | None: ...

    async def finish(self, job: str, result: Completed | Failed | Released) -> Refused | None: ...
