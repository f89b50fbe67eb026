"""Fenced writes: an agent's (`Fencing`) and the operator's (`Binder`). A refused write says why and changes nothing.

The fence (epoch and agent, without a TTL) is the operator's word on who may run a job; the lease (with a TTL) is that
agent's sign of life. Each write of an agent is compared with both inside one script, so a paused or cut-off agent can
wake at any moment and do no harm. Each write of an operator is compared with the token of the newest one in the same
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from coserve_api.errors import InvalidValueError, MessageError
from coserve_contract import lua
from coserve_contract.connect import command, run_script
from coserve_contract.keys import Keys
from coserve_contract.message import MESSAGE_BYTES
from coserve_contract.messages import Binding, Checkpoint, Completed, Failed, Heartbeat, Progress, Released, load_result

T = TypeVar("T")
HEARTBEAT_TTL_MS = 5_000
LEASE_TTL_MS = 10_000
BIND_LOOKS = 5
"""How often a binding is tried while the agent before writes in between; a bound, since whoever writes may not stop."""


class Reason(StrEnum):
    """Why a write was refused."""

    NO_FENCE = "no_fence"
    """Nobody is bound: Redis was emptied or the job deleted. Wait for the operator."""
    STALE_EPOCH = "stale_epoch"
    """The job is bound under another epoch: stop."""
    NOT_OWNER = "not_owner"
    """The epoch is right, the agent is not: stop."""
    LOST_LEASE = "lost_lease"
    """The lease ran out or was never taken: take it again."""
    INCARNATION = "incarnation"
    """Redis lost something since the agent registered: register again, then take the lease again."""
    FINISHED = "finished"
    """A result is recorded: there is nothing to run."""
    BEHIND = "behind"
    """A later checkpoint is recorded already (or, for a rewind, an earlier one)."""
    CHANGED = "changed"
    """What was read has changed meanwhile: look again."""
    STALE_TOKEN = "stale_token"
    """An operator with the token in `detail` has written: this one leads no more."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A refused write. `epoch` is the fence's, where there is one; `detail` its agent, or what else explains it."""

    reason: Reason
    epoch: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        return f"refused: {self.reason} (current epoch {self.epoch}, {self.detail or 'no detail'})"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a job, and the checkpoint to resume from: None is from the beginning."""

    checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class Fence:
    """Who may run a job. `agent` is empty while nobody may."""

    epoch: int
    agent: str


def _refused(reply: list[Any]) -> Refused | None:
    """The refusal in a script's reply; epoch and detail may be what a tenant has written."""
    if reply[0] != b"refused":
        return None
    return Refused(Reason(reply[1].decode()), _epoch(reply[2]), reply[3][:200].decode(errors="replace"))


def _epoch(raw: bytes) -> int | None:
    return int(raw) if len(raw) <= 16 and raw.isdigit() else None


def load_fence(key: str, raw: Sequence[bytes | None]) -> Fence | None:
    """A fence from its fields epoch and agent; MessageError where the epoch is none."""
    if raw[0] is None:
        return None
    epoch = _epoch(raw[0])
    if epoch is None:
        raise MessageError(key, "epoch", repr(raw[0][:17]), "delete the key; the job is bound anew")
    return Fence(epoch, (raw[1] or b"")[:200].decode(errors="replace"))


def first_after(cursor: int) -> str:
    """The ID of the first shard that a cursor does not cover."""
    return f"{cursor + 1}-0"


def _read(load: Callable[[str, Any], T | None], raw: Any) -> T | None:
    """None also for what does not read."""
    try:
        return load("", raw) if raw else None
    except MessageError:
        return None


@dataclass
class Fencing:
    """An agent's side. Methods that write for a job return None when it was done, or why not.

    `incarnation` is what the agent registered with. `heartbeat` returns the current one: where it differs, or is empty,
    call `register` with it and take every lease again; until then nothing is accepted.
    """

    redis: Redis
    keys: Keys
    agent: str
    lease_ttl_ms: int = LEASE_TTL_MS
    heartbeat_ttl_ms: int = HEARTBEAT_TTL_MS
    incarnation: str = field(default="", init=False)
    _told: Any = field(default=None, init=False)

    def register(self, incarnation: str) -> None:
        """Go on under `incarnation`."""
        self.incarnation = incarnation

    async def heartbeat(self, beat: Heartbeat) -> str:
        """Say that the agent lives; returns the current incarnation ("" while the operator has not written one). The
        operator looks at once where more has changed than figures.
        """
        keys = [self.keys.incarnation(), self.keys.agents(), self.keys.agent(self.agent), self.keys.changed()]
        mark = "" if beat.state == self._told else "1"
        values: list[str | int] = [self.agent, beat.dumps(), self.heartbeat_ttl_ms, mark]
        reply = await run_script(self.redis, lua.HEARTBEAT, keys, values)
        self._told = beat.state
        return str(reply[1].decode())

    async def leave(self) -> None:
        """Take the agent out of the index, at the end of a drain."""
        keys = [self.keys.agents(), self.keys.agent(self.agent), self.keys.changed()]
        await run_script(self.redis, lua.LEAVE, keys, [self.agent])

    async def take_lease(self, job: str, epoch: int) -> Lease | Refused:
        """Take (or take again) the lease, if the fence names this agent and epoch, and drop the shards the checkpoint
        covers. MessageError where the checkpoint does not read: nobody knows where to go on.
        """
        key, seen = self.keys.checkpoint(job), await self._checkpoint(job)
        known = _read(Checkpoint.loads, seen)
        more = [key, self.keys.result(job), self.keys.shards(job)]
        values = [self.lease_ttl_ms, seen, first_after(known.cursor if known else 0)]
        refused = _refused(await self._guarded(lua.TAKE_LEASE, job, epoch, more, values))
        return refused or Lease(Checkpoint.loads(key, seen) if seen else None)

    async def renew_lease(self, job: str, epoch: int) -> Refused | None:
        """Keep a lease that has not run out."""
        return _refused(await self._guarded(lua.RENEW_LEASE, job, epoch, [], [self.lease_ttl_ms]))

    async def report_progress(self, job: str, progress: Progress) -> Refused | None:
        """Say how far the job is; the feeder goes on from `progress.cursor`, and from `progress.eval_cursor`, up to
        which the held-out shards are deleted.
        """
        more = [self.keys.progress(job), self.keys.eval(job)]
        kept = progress.eval_cursor
        values = [progress.dumps(), *(("", "") if kept is None else (kept, first_after(kept)))]
        return _refused(await self._guarded(lua.REPORT_PROGRESS, job, progress.epoch, more, values))

    async def accept_checkpoint(self, job: str, epoch: int, checkpoint: Checkpoint) -> Refused | None:
        """Make a durable checkpoint the one to resume from, and drop the shards it covers. May be sent again.

        `epoch` is the binding's; `checkpoint.epoch` may be an earlier one, after a resume.
        """
        seen = await self._checkpoint(job)
        old = _read(Checkpoint.loads, seen)
        later = old is not None and (old.step > checkpoint.step or old.cursor > checkpoint.cursor)
        more = [self.keys.checkpoint(job), self.keys.shards(job)]
        arguments = [seen, old.step if old and later else "", checkpoint.dumps(), first_after(checkpoint.cursor)]
        return _refused(await self._guarded(lua.ACCEPT_CHECKPOINT, job, epoch, more, arguments))

    async def rewind(self, job: str, epoch: int, checkpoint: Checkpoint | None) -> Refused | None:
        """Replace an accepted checkpoint that does not read by an earlier one (None: start anew); the feeder feeds
        again from there.
        """
        seen = await self._checkpoint(job)
        old = _read(Checkpoint.loads, seen)
        behind: int | str = "" if seen else 0
        if old is not None and checkpoint is not None and checkpoint.step >= old.step:
            behind = old.step
        more = [self.keys.checkpoint(job), self.keys.shards(job), self.keys.progress(job), self.keys.eval(job)]
        more.append(self.keys.changed())
        text = "" if checkpoint is None else checkpoint.dumps()
        return _refused(await self._guarded(lua.REWIND, job, epoch, more, [seen, behind, text]))

    async def finish(self, job: str, result: Completed | Failed | Released) -> Refused | None:
        """Record how the job ended here, and drop the lease. May be sent again."""
        more = [self.keys.result(job), self.keys.shards(job), self.keys.eval(job), self.keys.changed()]
        final = "0" if isinstance(result, Released) else "1"
        return _refused(await self._guarded(lua.FINISH, job, result.epoch, more, [result.dumps(), final]))

    async def _checkpoint(self, job: str) -> bytes:
        found: bytes | None = await command(self.redis, "GET", self.keys.checkpoint(job))
        return found or b""

    async def _guarded(self, script: str, job: str, epoch: int, keys: list[str], arguments: list[Any]) -> list[Any]:
        guard = [self.keys.incarnation(), self.keys.fence(job), self.keys.owner(job)]
        reply: list[Any] = await run_script(
            self.redis, script, [*guard, *keys], [self.incarnation, self.agent, epoch, *arguments]
        )
        return reply


async def write_led(
    redis: Redis, keys: Keys, token: int, script: str, more: Sequence[str], values: Sequence[Any]
) -> Any:
    """What an operator writes of an endpoint under its fencing token: the script's answer, or the Refused."""
    reply = await run_script(redis, script, [keys.token(), *more], [token, *values])
    return _refused(reply) or (reply[1] if len(reply) > 1 else None)


async def seen_fence(redis: Redis, keys: Keys, job: str) -> tuple[list[bytes], Fence | None]:
    """A job's fence as it stands there, and as it reads: None also where it does not."""
    try:
        raw = await command(redis, "HMGET", keys.fence(job), "epoch", "agent")
    except ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        raw = [None, None]
    return [part or b"" for part in raw], _read(load_fence, raw)


def bindings_of(keys: Keys, fence: Fence | None, otherwise: str) -> str:
    """The key of what the agent in a fence was told, where it is an agent's name that stands there."""
    try:
        return keys.bindings(fence.agent) if fence else otherwise
    except InvalidValueError:
        return otherwise


@dataclass(frozen=True)
class Binder:
    """The operator's side, under its fencing `token`. Methods return None when it was done, or why not: all of them
    stale_token, where an operator with a greater one has written.
    """

    redis: Redis
    keys: Keys
    token: int = 0

    async def claim(self) -> Refused | None:
        """The first write of a leader to an endpoint; refused where its token is not greater than any before."""
        return await self._led(lua.CLAIM, [], [])

    async def confirm(self) -> Refused | None:
        """Nothing but the token's comparison, before what no script can do."""
        return await self._led(lua.LED, [], [])

    async def bind(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """Give the job to `agent` under `binding.epoch`, which must be above the fence's; drops the old binding, lease
        and Released result.

        `binding.resume` replaces the checkpoint in Redis only if it covers more steps. Where Redis has no fence (it was
        emptied), the epoch in status can be bound again as it is, and the agent goes on. What the agent before writes
        meanwhile is looked at again, some times. Refused: stale_token, stale_epoch, finished, changed. A fence, result
        or checkpoint that does not read counts as none.
        """
        for _ in range(BIND_LOOKS):
            refused = await self._bind(job, agent, binding)
            if refused is None or refused.reason is not Reason.CHANGED:
                break
        return refused

    async def _bind(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """One try of it."""
        seen, fence = await seen_fence(self.redis, self.keys, job)
        held, ended = [
            await command(self.redis, "GETRANGE", key, 0, MESSAGE_BYTES)
            for key in (self.keys.checkpoint(job), self.keys.result(job))
        ]
        if not isinstance(_read(load_result, ended), Released | None):
            return Refused(Reason.FINISHED, fence.epoch if fence else None, fence.agent if fence else "")
        if fence is not None and fence.epoch >= binding.epoch:
            return Refused(Reason.STALE_EPOCH, fence.epoch, fence.agent)
        known, resume = _read(Checkpoint.loads, held), binding.resume
        if resume is not None and known is not None and known.step >= resume.step:
            resume = None
        keys = [
            self.keys.jobs(),
            self.keys.fence(job),
            self.keys.owner(job),
            self.keys.checkpoint(job),
            self.keys.result(job),
            self.keys.shards(job),
            bindings_of(self.keys, fence, self.keys.bindings(agent)),
            self.keys.bindings(agent),
            self.keys.eval(job),
        ]
        put = ("", "") if resume is None else (resume.dumps(), first_after(resume.cursor))
        values = [job, *seen, held, ended, agent, binding.epoch, binding.dumps(), *put]
        return await self._led(lua.BIND, keys, values)

    async def rebrief(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """Replace the binding under the same epoch, to say Stop for one. Refused: stale_token, no_fence, stale_epoch,
        not_owner.
        """
        keys = [self.keys.fence(job), self.keys.bindings(agent)]
        return await self._led(lua.REBRIEF, keys, [job, agent, binding.epoch, binding.dumps()])

    async def unbind(self, job: str, agent: str, epoch: int) -> Refused | None:
        """Leave the job to nobody: the epoch stays, and nobody's writes are accepted. Refused: stale_token, no_fence,
        stale_epoch, not_owner.
        """
        keys = [self.keys.fence(job), self.keys.owner(job), self.keys.bindings(agent)]
        return await self._led(lua.UNBIND, keys, [job, agent, epoch])

    async def register(self, jobs: Iterable[str]) -> Refused | None:
        """Note that these jobs have keys, so that the keys go when the jobs do."""
        return await self._led(lua.REGISTER, [self.keys.jobs()], [*jobs])

    async def sweep_agents(self, age_ms: int = HEARTBEAT_TTL_MS) -> tuple[str, ...] | Refused:
        """The ids of agents whose last heartbeat is that old; they are taken out of the index (a heartbeat puts one
        back).
        """
        lost = await write_led(self.redis, self.keys, self.token, lua.SWEEP, [self.keys.agents()], [age_ms])
        return lost if isinstance(lost, Refused) else tuple(agent.decode(errors="replace") for agent in lost)

    async def _led(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Refused | None:
        refused: Refused | None = await write_led(self.redis, self.keys, self.token, script, keys, values)
        return refused
