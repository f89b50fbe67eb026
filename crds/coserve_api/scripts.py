"""Fenced writes: an agent's (`Fencing`) and the operator's (`Binder`). A refused write says why and changes nothing.

The fence (epoch and agent, without a TTL) is the operator's word on who may run a job; the lease (with a TTL) is that
agent's sign of life. Each write of an agent is compared with both inside one script, so a paused or cut-off agent can
wake at any moment and do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis

from coserve_api import lua
from coserve_api.connect import command, run_script
from coserve_api.keys import Keys
from coserve_api.messages import Binding, Checkpoint, Completed, Failed, Heartbeat, Progress, Released

HEARTBEAT_TTL_MS = 5_000
LEASE_TTL_MS = 10_000


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
    """The fence changed meanwhile: look again."""


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
    """The refusal in a script's reply."""
    if reply[0] != b"refused":
        return None
    epoch = reply[2].decode()
    return Refused(Reason(reply[1].decode()), int(epoch) if epoch else None, reply[3].decode())


async def read_fence(redis: Redis, keys: Keys, job: str) -> Fence | None:
    """The fence of a job, or None where nothing was ever bound (or Redis was emptied)."""
    epoch, agent = await command(redis, "HMGET", keys.fence(job), "epoch", "agent")
    return None if epoch is None else Fence(int(epoch), (agent or b"").decode())


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

    def register(self, incarnation: str) -> None:
        """Go on under `incarnation`."""
        self.incarnation = incarnation

    async def heartbeat(self, beat: Heartbeat) -> str:
        """Say that the agent lives; returns the current incarnation ("" while the operator has not written one)."""
        keys = [self.keys.incarnation(), self.keys.agents(), self.keys.agent(self.agent)]
        reply = await run_script(self.redis, lua.HEARTBEAT, keys, [self.agent, beat.dumps(), self.heartbeat_ttl_ms])
        return str(reply[1].decode())

    async def leave(self) -> None:
        """Take the agent out of the index, at the end of a drain."""
        await command(self.redis, "ZREM", self.keys.agents(), self.agent)
        await command(self.redis, "DEL", self.keys.agent(self.agent))

    async def take_lease(self, job: str, epoch: int) -> Lease | Refused:
        """Take (or take again) the lease, if the fence names this agent and epoch, and drop the shards the checkpoint
        covers.
        """
        more = [self.keys.checkpoint(job), self.keys.result(job), self.keys.shards(job)]
        reply = await self._guarded(lua.TAKE_LEASE, job, epoch, more, [self.lease_ttl_ms])
        refused = _refused(reply)
        if refused is not None:
            return refused
        return Lease(Checkpoint.loads(self.keys.checkpoint(job), reply[1]) if reply[1] else None)

    async def renew_lease(self, job: str, epoch: int) -> Refused | None:
        """Keep a lease that has not run out."""
        return _refused(await self._guarded(lua.RENEW_LEASE, job, epoch, [], [self.lease_ttl_ms]))

    async def release_lease(self, job: str, epoch: int) -> Refused | None:
        """Drop the lease without a word on the job; `finish` with Released is how a job is given back."""
        return _refused(await self._guarded(lua.RELEASE_LEASE, job, epoch, [], []))

    async def report_progress(self, job: str, progress: Progress) -> Refused | None:
        """Say how far the job is; the feeder goes on from `progress.cursor`."""
        more = [self.keys.progress(job)]
        return _refused(await self._guarded(lua.REPORT_PROGRESS, job, progress.epoch, more, [progress.dumps()]))

    async def accept_checkpoint(self, job: str, epoch: int, checkpoint: Checkpoint) -> Refused | None:
        """Make a durable checkpoint the one to resume from, and drop the shards it covers. May be sent again.

        `epoch` is the binding's; `checkpoint.epoch` may be an earlier one, after a resume.
        """
        more = [self.keys.checkpoint(job), self.keys.shards(job)]
        return _refused(await self._guarded(lua.ACCEPT_CHECKPOINT, job, epoch, more, [checkpoint.dumps()]))

    async def rewind(self, job: str, epoch: int, checkpoint: Checkpoint | None) -> Refused | None:
        """Replace an accepted checkpoint that does not read by an earlier one (None: start anew); the feeder feeds
        again from there.
        """
        more = [self.keys.checkpoint(job), self.keys.shards(job), self.keys.progress(job)]
        text = "" if checkpoint is None else checkpoint.dumps()
        return _refused(await self._guarded(lua.REWIND, job, epoch, more, [text]))

    async def finish(self, job: str, result: Completed | Failed | Released) -> Refused | None:
        """Record how the job ended here, and drop the lease. May be sent again."""
        more = [self.keys.result(job), self.keys.shards(job), self.keys.eval(job)]
        final = "0" if isinstance(result, Released) else "1"
        return _refused(await self._guarded(lua.FINISH, job, result.epoch, more, [result.dumps(), final]))

    async def _guarded(
        self, script: str, job: str, epoch: int, keys: list[str], arguments: list[str | int]
    ) -> list[Any]:
        guard = [self.keys.incarnation(), self.keys.fence(job), self.keys.owner(job)]
        reply: list[Any] = await run_script(
            self.redis, script, [*guard, *keys], [self.incarnation, self.agent, epoch, *arguments]
        )
        return reply


@dataclass(frozen=True)
class Binder:
    """The operator's side."""

    redis: Redis
    keys: Keys

    async def bind(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """Give the job to `agent` under `binding.epoch`, which must be above the fence's; drops the old binding, lease
        and Released result.

        `binding.resume` replaces the checkpoint in Redis only if it covers more steps. Where Redis has no fence (it was
        emptied), the epoch in status can be bound again as it is, and the agent goes on. Refused: stale_epoch,
        finished, changed.
        """
        fence = await read_fence(self.redis, self.keys, job)
        before = fence.agent if fence else ""
        keys = [
            self.keys.jobs(),
            self.keys.fence(job),
            self.keys.owner(job),
            self.keys.checkpoint(job),
            self.keys.result(job),
            self.keys.shards(job),
            self.keys.bindings(before or agent),
            self.keys.bindings(agent),
        ]
        resume = "" if binding.resume is None else binding.resume.dumps()
        arguments: list[str | int] = [job, before, agent, binding.epoch, binding.dumps(), resume]
        return _refused(await run_script(self.redis, lua.BIND, keys, arguments))

    async def rebrief(self, job: str, agent: str, binding: Binding) -> Refused | None:
        """Replace the binding under the same epoch, to say Stop for one. Refused: no_fence, stale_epoch, not_owner."""
        keys = [self.keys.fence(job), self.keys.bindings(agent)]
        return _refused(await run_script(self.redis, lua.REBRIEF, keys, [job, agent, binding.epoch, binding.dumps()]))

    async def unbind(self, job: str, agent: str, epoch: int) -> Refused | None:
        """Leave the job to nobody: the epoch stays, and nobody's writes are accepted. Refused: no_fence, stale_epoch,
        not_owner.
        """
        keys = [self.keys.fence(job), self.keys.owner(job), self.keys.bindings(agent)]
        return _refused(await run_script(self.redis, lua.UNBIND, keys, [job, agent, epoch]))

    async def sweep_agents(self, age_ms: int = HEARTBEAT_TTL_MS) -> tuple[str, ...]:
        """The ids of agents whose last heartbeat is that old; they are taken out of the index (a heartbeat puts one
        back).
        """
        lost = await run_script(self.redis, lua.SWEEP, [self.keys.agents()], [age_ms])
        return tuple(agent.decode() for agent in lost)
