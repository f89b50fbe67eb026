"""The operator's side of Redis: what it writes, and users asserted at each reconnect.

Redis is not the truth. After it lost something, the next reconcile of each endpoint puts back what the custom resources
say; until every living agent has had the time for a heartbeat, a missing one proves nothing (`settled`).
"""

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from coserve_contract.acl import acl_deluser, acl_setuser, acl_username
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import AdapterRecord
from coserve_contract.scripts import HEARTBEAT_TTL_MS, Binder, Reason, Refused
from coserve_contract.store import Store, changes, endpoint_uids
from coserve_operator.decide.actions import Bind, ClearStreams, Forget, RedisAction, Unbind
from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.redis.reader import read

SETTLE_S = HEARTBEAT_TTL_MS / 1000 + 1.5
"""From the first reading after a gap until a missing heartbeat counts."""
METRICS_USER = "cs-metrics"


class StoreError(Exception):
    """Redis cannot be read or written at the moment."""


class Leadership(Protocol):
    """Under which fencing token something is written; both raise when the leadership is over."""

    def token(self) -> int:
        """Return it."""
        ...

    async def raise_above(self, token: int) -> None:
        """Take a greater one than this, which stands in a Redis."""
        ...


class NoLeadership:
    """Of a program that leads nothing, as long as no operator writes beside it."""

    def token(self) -> int:
        """Return the token that no operator has."""
        return 0

    async def raise_above(self, token: int) -> None:
        """Refuse."""
        raise StoreError(f"an operator with the fencing token {token} has written")


@dataclass
class OperatorStore:
    """All that the operator does with Redis. `clock` is monotonic; the endpoints' passwords derive from `key`."""

    redis: Redis
    key: bytes
    clock: Callable[[], float]
    metrics_password: str = ""
    leadership: Leadership = field(default_factory=NoLeadership)
    written: set[str] = field(default_factory=set, init=False)
    """Endpoints written to, and not read since."""
    _readable_since: float | None = field(default=None, init=False)
    _server: str = field(default="", init=False)
    _users: set[str] = field(default_factory=set, init=False)
    _claimed: set[str] = field(default_factory=set, init=False)
    _emptied_since: dict[str, float] = field(default_factory=dict, init=False)

    def credentials(self, uid: str) -> tuple[str, str]:
        """Return the endpoint's Redis user and password.

        The password is derived, not stored, so that the operator needs no right to read Secrets.
        """
        return acl_username(uid), hmac.new(self.key, uid.encode(), hashlib.sha256).hexdigest()

    async def check(self) -> bool:
        """Return whether this is another Redis than at the last call (a restart, a fail-over), which knows no users."""
        info = await self._run(command(self.redis, "INFO", "server"))
        text = info.decode() if isinstance(info, bytes) else ""
        server = info.get("run_id", "") if isinstance(info, dict) else _run_id(text)
        if self._readable_since is not None and server == self._server:
            return False
        self._server, self._readable_since = server, self.clock()
        self._users.clear()
        if self.metrics_password:
            await self._run(command(self.redis, *_metrics_user(self.metrics_password)))
        return True

    async def assert_user(self, uid: str) -> None:
        """Make sure that the endpoint's user exists, with its password and rights.

        First of all an earlier leader's writes are refused from now on: what is read after this is not changed by it.
        """
        if uid not in self._claimed:
            await self._write(uid, Binder.claim)
            self._claimed.add(uid)
        if uid not in self._users:
            await self._run(command(self.redis, *acl_setuser(uid, self.credentials(uid)[1])))
            self._users.add(uid)

    async def read(self, wants: Mapping[str, Sequence[str]]) -> dict[str, RedisView | Unreadable]:
        """Return what Redis holds of each endpoint uid and of the job uids given for it."""
        found: dict[str, RedisView | Unreadable] = await self._run(read(self.redis, wants, self._settled))
        return found

    async def changes(self, uids: Sequence[str]) -> dict[str, tuple[Any, bool]]:
        """Return, of each endpoint, what is another value where it should be read, and whether an agent is lost."""
        found = await self._run(changes(self.redis, uids, HEARTBEAT_TTL_MS))
        return dict(zip(uids, found, strict=True))

    async def do(self, uid: str, action: RedisAction) -> Refused | None:
        """Carry out one decision; return why Redis refused it, if it did."""
        job = action.job_uid
        if isinstance(action, Forget):
            return await self._write(uid, lambda binder: self._store(binder).delete_job(job))
        if isinstance(action, ClearStreams):
            return await self._write(uid, lambda binder: self._store(binder).clear_streams(job))
        if isinstance(action, Bind):
            return await self._write(uid, lambda binder: binder.bind(job, action.agent, action.binding))
        if isinstance(action, Unbind):
            return await self._write(uid, lambda binder: binder.unbind(job, action.agent, action.epoch))
        return await self._write(uid, lambda binder: binder.rebrief(job, action.agent, action.binding))

    async def register(self, uid: str, jobs: Collection[str]) -> None:
        """Note that these jobs have keys, so that the keys go when the jobs do."""
        await self._write(uid, lambda binder: binder.register(jobs))

    async def sweep_agents(self, uid: str) -> None:
        """Take lost agents out of the index."""
        await self._write(uid, Binder.sweep_agents)

    async def set_adapters(self, uid: str, records: Collection[AdapterRecord]) -> None:
        """Say which versions every agent is to serve."""
        await self._write(uid, lambda binder: self._store(binder).set_adapters(records))

    async def begin(self, uid: str) -> None:
        """Write a new incarnation: all that the custom resources know is in Redis, and agents may register."""
        await self._write(uid, lambda binder: self._store(binder).set_incarnation(secrets.token_hex(8)))
        self._emptied_since.pop(uid, None)

    async def endpoints(self) -> frozenset[str]:
        """Return the uids of endpoints with keys."""
        found: frozenset[str] = await self._run(endpoint_uids(self.redis))
        return found

    async def delete_endpoint(self, uid: str) -> None:
        """Delete the user first, which ends its connections, then the keys."""
        await self._write(uid, Binder.confirm)
        await self._run(command(self.redis, *acl_deluser(uid)))
        await self._write(uid, lambda binder: self._store(binder).delete_endpoint())
        self._users.discard(uid)
        self._claimed.discard(uid)
        self._emptied_since.pop(uid, None)

    def _store(self, binder: Binder) -> Store:
        return Store(binder.redis, binder.keys, binder.token)

    async def _write(self, uid: str, write: Callable[[Binder], Awaitable[Any]]) -> Refused | None:
        """Write under our token; where Redis has a greater one, under one above that if the Lease is still ours."""
        self.written.add(uid)
        while True:
            answer = await self._run(write(Binder(self.redis, Keys(uid), self.leadership.token())))
            refused = answer if isinstance(answer, Refused) else None
            if refused is None or refused.reason is not Reason.STALE_TOKEN:
                return refused
            await self.leadership.raise_above(int(refused.detail))

    async def _run(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except (RedisError, OSError) as error:
            if isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError)):
                self._readable_since = None
            raise StoreError(f"Redis: {error or type(error).__name__}") from error

    def _settled(self, uid: str, emptied: bool) -> bool:
        now = self.clock()
        if self._readable_since is None:
            self._readable_since = now
        if emptied:
            self._emptied_since.setdefault(uid, now)
        since = max(self._readable_since, self._emptied_since.get(uid, 0.0))
        return now - since >= SETTLE_S


def _metrics_user(password: str) -> tuple[str, ...]:
    """Return the command that makes the metrics API's user: it reads agents' heartbeats and nothing else."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    rules = ("reset", "on", f"#{digest}", "%R~cs:{*}:agent*", "+ping", "+zrange", "+mget", "+client|setname")
    return ("ACL", "SETUSER", METRICS_USER, *rules)


def _run_id(info: str) -> str:
    return next((line.removeprefix("run_id:") for line in info.splitlines() if line.startswith("run_id:")), "")
