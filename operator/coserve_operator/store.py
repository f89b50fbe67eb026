"""The operator's side of Redis: a batched read of many endpoints, and users asserted at each reconnect.

Redis is not the truth. After it lost something, the next reconcile of each endpoint puts back what the custom resources
say; until every living agent has had the time for a heartbeat, a missing one proves nothing (`settled`).
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from coserve_api.acl import acl_deluser, acl_setuser, acl_username
from coserve_api.connect import COMMAND_S, command
from coserve_api.errors import MessageError
from coserve_api.keys import Keys
from coserve_api.messages import (
    AdapterRecord,
    Binding,
    Checkpoint,
    FeedStatus,
    Heartbeat,
    Message,
    Progress,
    load_result,
)
from coserve_api.scripts import HEARTBEAT_TTL_MS, Binder, Fence, Refused
from coserve_api.store import JobRecord, Store, endpoint_uids
from coserve_operator.reconcile.job import Bind, Forget, RedisAction, Unbind
from coserve_operator.reconcile.observed import RedisView

SETTLE_S = HEARTBEAT_TTL_MS / 1000 + 1.5
"""From the first reading after a gap until a missing heartbeat counts."""
METRICS_USER = "cs-metrics"
_STRINGS = (Keys.owner, Keys.checkpoint, Keys.progress, Keys.result, Keys.feed)


T = TypeVar("T")
M = TypeVar("M", bound=Message)


class StoreError(Exception):
    """Redis cannot be read or written at the moment."""


@dataclass
class OperatorStore:
    """All that the operator does with Redis. `clock` is monotonic; the endpoints' passwords derive from `key`."""

    redis: Redis
    key: bytes
    clock: Callable[[], float]
    metrics_password: str = ""
    _readable_since: float | None = field(default=None, init=False)
    _server: str = field(default="", init=False)
    _users: set[str] = field(default_factory=set, init=False)
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
        """Make sure that the endpoint's user exists, with its password and rights."""
        if uid not in self._users:
            await self._run(command(self.redis, *acl_setuser(uid, self.credentials(uid)[1])))
            self._users.add(uid)

    async def read(self, wants: Mapping[str, Sequence[str]]) -> dict[str, RedisView]:
        """Return what Redis holds of each endpoint uid and of the job uids given for it: two round trips in all."""
        first = self.redis.pipeline(transaction=False)
        for uid, jobs in wants.items():
            keys = Keys(uid)
            first.get(keys.incarnation())
            first.zrange(keys.agents(), 0, -1)
            first.smembers(keys.jobs())
            first.hgetall(keys.adapters())
            for job in jobs:
                first.hmget(keys.fence(job), ["epoch", "agent"])
                first.mget([name(keys, job) for name in _STRINGS])
                first.xlen(keys.shards(job))
        answers = iter(await self._run(_in_time(first)))
        raws: dict[str, _Raw] = {}
        for uid, jobs in wants.items():
            raw = _Raw(next(answers), next(answers), next(answers), next(answers))
            raw.jobs = {job: (next(answers), next(answers), next(answers)) for job in jobs}
            raws[uid] = raw
        second = self.redis.pipeline(transaction=False)
        asked = False
        for uid, raw in raws.items():
            keys = Keys(uid)
            for agent in raw.agents:
                second.get(keys.agent(agent.decode()))
                asked = True
            for job, holder in raw.fenced():
                second.hget(keys.bindings(holder), job)
                asked = True
        answers = iter(await self._run(_in_time(second)) if asked else ())
        return {uid: self._view(uid, raw, answers) for uid, raw in raws.items()}

    async def do(self, uid: str, action: RedisAction) -> Refused | None:
        """Carry out one decision; return why Redis refused it, if it did."""
        binder = Binder(self.redis, Keys(uid))
        if isinstance(action, Forget):
            await self._run(Store(self.redis, Keys(uid)).delete_job(action.job_uid))
            return None
        if isinstance(action, Bind):
            work = binder.bind(action.job_uid, action.agent, action.binding)
        elif isinstance(action, Unbind):
            work = binder.unbind(action.job_uid, action.agent, action.epoch)
        else:
            work = binder.rebrief(action.job_uid, action.agent, action.binding)
        refused: Refused | None = await self._run(work)
        return refused

    async def register(self, uid: str, jobs: Iterable[str]) -> None:
        """Note that these jobs have keys, so that the keys go when the jobs do."""
        await self._run(command(self.redis, "SADD", Keys(uid).jobs(), *jobs))

    async def sweep_agents(self, uid: str) -> None:
        """Take lost agents out of the index."""
        await self._run(Binder(self.redis, Keys(uid)).sweep_agents())

    async def set_adapters(self, uid: str, records: Iterable[AdapterRecord]) -> None:
        """Say which versions every agent is to serve."""
        await self._run(Store(self.redis, Keys(uid)).set_adapters(records))

    async def begin(self, uid: str) -> None:
        """Write a new incarnation: all that the custom resources know is in Redis, and agents may register."""
        await self._run(Store(self.redis, Keys(uid)).set_incarnation(secrets.token_hex(8)))
        self._emptied_since.pop(uid, None)

    async def endpoints(self) -> frozenset[str]:
        """Return the uids of endpoints with keys."""
        found: frozenset[str] = await self._run(endpoint_uids(self.redis))
        return found

    async def delete_endpoint(self, uid: str) -> None:
        """Delete the user first, which ends its connections, then the keys."""
        await self._run(command(self.redis, *acl_deluser(uid)))
        await self._run(Store(self.redis, Keys(uid)).delete_endpoint())
        self._users.discard(uid)
        self._emptied_since.pop(uid, None)

    async def _run(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except (RedisError, OSError) as error:
            if isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError)):
                self._readable_since = None
            raise StoreError(f"Redis: {error or type(error).__name__}") from error

    def _view(self, uid: str, raw: "_Raw", answers: Any) -> RedisView:
        keys, broken = Keys(uid), _Broken()
        agents: dict[str, Heartbeat] = {}
        for agent in (each.decode() for each in raw.agents):
            beat = broken.parsed(Heartbeat, keys.agent(agent), next(answers))
            if beat is not None:
                agents[agent] = beat
        bindings: dict[str, Binding] = {}
        for job, agent in raw.fenced():
            binding = broken.parsed(Binding, f"{keys.bindings(agent)}[{job}]", next(answers))
            if binding is not None:
                bindings[job] = binding
        adapters: dict[str, AdapterRecord] = {}
        for name, value in raw.adapters.items():
            record = broken.parsed(AdapterRecord, f"{keys.adapters()}[{name.decode()}]", value)
            if record is not None:
                adapters[record.name] = record
        return RedisView(
            incarnation=None if raw.incarnation is None else raw.incarnation.decode(),
            agents=agents,
            jobs={job: _record(keys, job, *answer, broken) for job, answer in raw.jobs.items()},
            bindings=bindings,
            known_jobs=frozenset(each.decode() for each in raw.known),
            adapters=adapters,
            broken=tuple(broken.errors),
            settled=self._settled(uid, raw.incarnation is None),
            lost_agents=len(raw.agents) - len(agents),
        )

    def _settled(self, uid: str, emptied: bool) -> bool:
        now = self.clock()
        if self._readable_since is None:
            self._readable_since = now
        if emptied:
            self._emptied_since.setdefault(uid, now)
        since = max(self._readable_since, self._emptied_since.get(uid, 0.0))
        return now - since >= SETTLE_S


async def _in_time(pipeline: Pipeline) -> Any:
    """Send a pipeline. The client has no time limit of its own: before Python 3.12 that swallows cancellations."""
    async with asyncio.timeout(COMMAND_S):
        return await pipeline.execute()


@dataclass
class _Raw:
    """Replies of the first round trip for one endpoint."""

    incarnation: bytes | None
    agents: list[bytes]
    known: Iterable[bytes]
    adapters: dict[bytes, bytes]
    jobs: dict[str, tuple[list[bytes | None], list[bytes | None], int]] = field(default_factory=dict)

    def fenced(self) -> list[tuple[str, str]]:
        """Return (job, agent) for each job that is bound."""
        return [(job, agent.decode()) for job, ((_, agent), _, _) in self.jobs.items() if agent]


@dataclass
class _Broken:
    """Messages that did not read: they count as absent, and are told once a reconcile."""

    errors: list[MessageError] = field(default_factory=list)

    def parsed(self, model: type[M], key: str, raw: bytes | None) -> M | None:
        return self.loaded(model.loads, key, raw)

    def loaded(self, load: Callable[[str, bytes], T], key: str, raw: bytes | None) -> T | None:
        try:
            return None if raw is None else load(key, raw)
        except MessageError as error:
            self.errors.append(error)
            return None


def _record(
    keys: Keys, job: str, fence: list[bytes | None], strings: list[bytes | None], length: int, broken: _Broken
) -> JobRecord:
    owner, checkpoint, progress, result, feed = strings
    accepted = broken.loaded(Checkpoint.loads, keys.checkpoint(job), checkpoint)
    return JobRecord(
        fence=None if fence[0] is None else Fence(int(fence[0]), (fence[1] or b"").decode()),
        owner=None if owner is None else owner.decode(),
        checkpoint=accepted,
        progress=broken.loaded(Progress.loads, keys.progress(job), progress),
        result=broken.loaded(load_result, keys.result(job), result),
        feed=broken.loaded(FeedStatus.loads, keys.feed(job), feed),
        last_shard=(accepted.cursor if accepted else 0) + length,
    )


def _metrics_user(password: str) -> tuple[str, ...]:
    """Return the command that makes the metrics API's user: it reads agents' heartbeats and nothing else."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    rules = ("reset", "on", f"#{digest}", "%R~cs:{*}:agent*", "+ping", "+zrange", "+mget", "+client|setname")
    return ("ACL", "SETUSER", METRICS_USER, *rules)


def _run_id(info: str) -> str:
    return next((line.removeprefix("run_id:") for line in info.splitlines() if line.startswith("run_id:")), "")
