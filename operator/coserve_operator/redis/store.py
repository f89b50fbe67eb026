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
from redis.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from coserve_contract.acl import acl_deluser, acl_setuser, acl_username
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import AdapterRecord
from coserve_contract.scripts import HEARTBEAT_TTL_MS, Binder, Reason, Refused
from coserve_contract.store import Store, changes, endpoint_uids
from coserve_operator.decide.actions import Bind, ClearStreams, Forget, RedisAction, Unbind
from coserve_operator.decide.observed import Obstacle, RedisView, Unreadable
from coserve_operator.redis.reader import Reader

SETTLE_S = HEARTBEAT_TTL_MS / 1000 + 1.5
"""From the first reading after a gap until a missing heartbeat counts."""
METRICS_USER = "cs-metrics"
BUSY, DENIED, FULL_MEMORY, FULL_CLIENTS = "Busy", "AccessDenied", "OutOfMemory", "TooManyConnections"
"""Reasons of RedisReady."""


KEEPS = "noeviction"
FULL = 0.95
"""Share of maxmemory at which a Redis is full: what is below comes and goes with heartbeats."""


class StoreError(Exception):
    """Redis cannot be read or written at the moment; `reason` is a condition's."""

    def __init__(self, message: str, reason: str = "Unreachable") -> None:
        super().__init__(message)
        self.reason = reason


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
    """All that the operator does with one Redis. `clock` is monotonic; the endpoints' passwords derive from `key`, and
    are taken by `previous_key` too. `shared_user` is a name and a password: that of all endpoints, where there can be
    no other users.
    """

    redis: Redis
    key: bytes
    clock: Callable[[], float]
    metrics_password: str = ""
    leadership: Leadership = field(default_factory=NoLeadership)
    previous_key: bytes = b""
    shared_user: tuple[str, str] | None = None
    trouble: Unreadable | None = field(default=None, init=False)
    """What was the matter at the last check. Until the next one nothing is asked: it would hold up other tenants."""
    obstacle: Obstacle | None = field(default=None, init=False)
    """Why there may be no such Redis."""
    written: set[str] = field(default_factory=set, init=False)
    """Endpoints written to, and not read since."""
    _reader: Reader = field(default_factory=Reader, init=False)
    _readable_since: float | None = field(default=None, init=False)
    _server: str = field(default="", init=False)
    _users: set[str] = field(default_factory=set, init=False)
    _claimed: set[str] = field(default_factory=set, init=False)
    _emptied_since: dict[str, float] = field(default_factory=dict, init=False)

    def credentials(self, uid: str) -> tuple[str, str]:
        """Return the endpoint's Redis user and password.

        The password is derived, not stored, so that the operator needs no right to read Secrets.
        """
        return self.shared_user or (acl_username(uid), _password(self.key, uid))

    async def check(self) -> bool:
        """Return whether this is another Redis than at the last call (a restart, a fail-over), which knows no users.

        StoreError: it does not answer, or is so full that what is missing there proves nothing.
        """
        try:
            info = await self._run(command(self.redis, "INFO"))
            trouble = _trouble(info)
            if trouble is not None:
                self._readable_since = None
                raise StoreError(trouble.message, trouble.reason)
            server = info.get("run_id", "")
            if self._readable_since is not None and server == self._server:
                self.trouble = None
                return False
            self._users.clear()
            if self.metrics_password and self.shared_user is None:
                await self._set_user(_metrics_user(self.metrics_password))
            self._server, self._readable_since, self.trouble = server, self.clock(), None
        except StoreError as error:
            self.trouble = Unreadable(error.reason, str(error))
            raise
        return True

    async def assert_user(self, uid: str) -> None:
        """Make sure that the endpoint's user exists, with its password and rights.

        First of all an earlier leader's writes are refused from now on: what is read after this is not changed by it.
        """
        self._ask()
        if uid not in self._claimed:
            await self._write(uid, Binder.claim)
            self._claimed.add(uid)
        if uid not in self._users and self.shared_user is None:
            keys = filter(None, (self.key, self.previous_key))
            await self._set_user(acl_setuser(uid, *(_password(key, uid) for key in keys)))
            self._users.add(uid)

    async def read(self, wants: Mapping[str, Sequence[str]]) -> dict[str, RedisView | Unreadable]:
        """Return what Redis holds of each endpoint uid and of the job uids given for it."""
        self._ask()
        found: dict[str, RedisView | Unreadable] = await self._run(self._reader.read(self.redis, wants, self._settled))
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
        self._ask()
        found: frozenset[str] = await self._run(endpoint_uids(self.redis))
        return found

    async def delete_endpoint(self, uid: str) -> None:
        """Delete the user first, which ends its connections, then the keys."""
        await self._write(uid, Binder.confirm)
        if self.shared_user is None:
            await self._run(command(self.redis, *acl_deluser(uid)))
        await self._write(uid, lambda binder: self._store(binder).delete_endpoint())
        self._users.discard(uid)
        self._claimed.discard(uid)
        self._reader.forget(uid)
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

    async def _set_user(self, words: Sequence[str]) -> None:
        try:
            await self._run(command(self.redis, *words))
        except StoreError as error:
            if error.reason != DENIED:
                raise
            remedy = "grant ACL SETUSER to the operator's user, or set redis.external.endpointUsers to Shared"
            raise StoreError(f"{error}; {remedy}", DENIED) from error

    def _ask(self) -> None:
        """Refuse to ask a Redis that the last check found in trouble."""
        if self.trouble is not None:
            raise StoreError(self.trouble.message, self.trouble.reason)

    async def _run(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except (RedisError, OSError) as error:
            reason, away = _reason(error), isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError))
            if away or reason in (BUSY, FULL_MEMORY):
                self._readable_since = None
            if away and self.obstacle is not None:
                raise StoreError(self.obstacle.message, self.obstacle.reason) from error
            raise StoreError(f"Redis: {str(error) or type(error).__name__}", reason) from error

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


def _password(key: bytes, uid: str) -> str:
    return hmac.new(key, uid.encode(), hashlib.sha256).hexdigest()


def _trouble(info: Mapping[str, Any]) -> Unreadable | None:
    """Return why heartbeats may be missing of agents that live, by what Redis says of itself."""
    most, clients = info.get("maxmemory", 0), info.get("maxclients", 0)
    evicts = info.get("maxmemory_policy", KEEPS) != KEEPS
    if most and not evicts and info.get("used_memory", 0) >= FULL * most:
        remedy = "delete what is not coserve's, or raise redis.resources.limits.memory"
        return Unreadable(FULL_MEMORY, f"Redis has no memory left of {most} bytes: {remedy}")
    if clients and info.get("connected_clients", 0) >= clients:
        remedy = "find the pods that open so many, or raise redis.maxClients"
        return Unreadable(FULL_CLIENTS, f"Redis has no connection left of {clients}: {remedy}")
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OutOfMemoryError):
        return FULL_MEMORY
    if isinstance(error, (NoPermissionError, AuthenticationError)):
        return DENIED
    text = str(error)
    if text.startswith("BUSY"):
        return BUSY
    return FULL_CLIENTS if "max number of clients reached" in text else "Unreachable"
