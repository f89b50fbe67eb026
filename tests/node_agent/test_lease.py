"""The right to write, against a real Redis: believed no longer than our own clock vouches for it, and never against
the fence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from coserve_agent.concurrency import end
from coserve_agent.errors import FencedError
from coserve_agent.jobs.lease import LeaseKeeper
from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_contract.connect import command, connect
from coserve_contract.keys import Keys
from coserve_contract.messages import Binding, BindingSpec, Checkpoint, Progress
from coserve_contract.scripts import Binder, Fencing, Reason
from coserve_contract.store import Store

JOB, KEYS = "job-1", Keys("endpoint-1")
SPEC = BindingSpec(
    job_uid=JOB,
    job_name="job",
    namespace="default",
    adapter_name="a",
    adapter_number=1,
    rank=4,
    alpha=8,
    target_modules=(TargetModule.Q,),
    learning_rate=1e-3,
    schedule=Schedule.LINEAR,
    warmup_steps=0,
    batch_size=1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    seed=0,
    checkpoint_every_steps=5,
    checkpoint_keep=2,
    publish=PublishPolicy.NEVER,
)


class Time:
    """A clock that moves when somebody sleeps, and hands over to the loop then."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def fencing(redis: Redis) -> Fencing:
    made = Fencing(redis, KEYS, "agent-1")
    await Store(redis, KEYS).set_incarnation("one")
    made.register("one")
    return made


@pytest.fixture
async def bind(redis: Redis) -> Callable[[str, int], Awaitable[None]]:
    async def to(agent: str, epoch: int) -> None:
        assert await Binder(redis, KEYS).bind(JOB, agent, Binding(epoch=epoch, spec=SPEC)) is None

    return to


@pytest.fixture
async def keeper(fencing: Fencing, bind: Any, time: Time) -> LeaseKeeper:
    await bind("agent-1", 1)
    return LeaseKeeper(fencing, JOB, 1, now_s=time, sleep=time.sleep)


def progress(step: int = 1) -> Progress:
    return Progress(epoch=1, step=step, cursor=step, total_steps=9)


async def step_until(keeper: LeaseKeeper, condition: Callable[[], bool]) -> None:
    """Let `keeper.run` go on until `condition` holds."""
    task = asyncio.create_task(keeper.run())
    try:
        async with asyncio.timeout(20):
            while not condition() and not task.done():
                await asyncio.wait((task,), timeout=0.001)
        if task.done():
            task.result()
    finally:
        await end(task)


async def test_a_lease_is_believed_for_less_than_its_time(keeper: LeaseKeeper, time: Time) -> None:
    assert not keeper.held
    assert await keeper.take() is None
    assert keeper.held
    time.now_s += 8.9
    assert keeper.held
    time.now_s += 0.2
    assert not keeper.held


async def test_it_is_renewed_at_a_third(keeper: LeaseKeeper, time: Time) -> None:
    await keeper.take()
    await step_until(keeper, lambda: len(time.slept) >= 30)
    assert time.slept[:20] == [pytest.approx(10 / 3)] * 20
    assert keeper.held


async def test_writes_go_through_while_it_is_held(keeper: LeaseKeeper, fencing: Fencing, redis: Redis) -> None:
    await keeper.take()
    assert await keeper.write(lambda: fencing.report_progress(JOB, progress())) is None
    await keeper.write_now(lambda: fencing.report_progress(JOB, progress(2)))
    record = await Store(redis, KEYS).job(JOB)
    assert record.progress == progress(2)
    assert record.owner == "agent-1:1"


async def test_a_checkpoint_behind_the_recorded_one_is_said(keeper: LeaseKeeper, fencing: Fencing) -> None:
    await keeper.take()

    def checkpoint(step: int) -> Checkpoint:
        return Checkpoint(step=step, cursor=step, epoch=1, path=f"jobs/x/e1/s{step}", sha256="0" * 64)

    assert await keeper.write(lambda: fencing.accept_checkpoint(JOB, 1, checkpoint(5))) is None
    refused = await keeper.write(lambda: fencing.accept_checkpoint(JOB, 1, checkpoint(4)))
    assert refused is not None
    assert refused.reason is Reason.BEHIND


@pytest.mark.parametrize(("agent", "epoch"), [("agent-2", 2), ("agent-1", 2)])
async def test_a_moved_fence_ends_everything(
    keeper: LeaseKeeper, fencing: Fencing, bind: Any, redis: Redis, agent: str, epoch: int
) -> None:
    await keeper.take()
    await bind(agent, epoch)
    with pytest.raises(FencedError, match="current epoch 2"):
        await keeper.write(lambda: fencing.report_progress(JOB, progress()))
    assert not keeper.held
    with pytest.raises(FencedError):
        await step_until(keeper, lambda: False)
    with pytest.raises(FencedError):
        await keeper.take()
    assert (await Store(redis, KEYS).job(JOB)).progress is None


async def test_a_lost_lease_is_taken_again_and_the_write_waits_for_it(
    keeper: LeaseKeeper, fencing: Fencing, redis: Redis
) -> None:
    await keeper.take()
    await command(redis, "DEL", KEYS.owner(JOB))
    write = asyncio.create_task(keeper.write(lambda: fencing.report_progress(JOB, progress())))
    await step_until(keeper, write.done)
    assert await write is None
    assert (await Store(redis, KEYS).job(JOB)).owner == "agent-1:1"


async def test_an_emptied_redis_is_waited_for(keeper: LeaseKeeper, fencing: Fencing, bind: Any, redis: Redis) -> None:
    await keeper.take()
    await command(redis, "FLUSHALL")
    write = asyncio.create_task(keeper.write(lambda: fencing.report_progress(JOB, progress())))
    await asyncio.sleep(0.05)
    assert not write.done()
    assert not keeper.held
    await bind("agent-1", 1)
    await Store(redis, KEYS).set_incarnation("two")
    assert not write.done()
    fencing.register("two")  # the heartbeat does this
    await step_until(keeper, write.done)
    assert await write is None


async def test_a_redis_that_is_down_is_waited_for(
    keeper: LeaseKeeper, fencing: Fencing, redis: Redis, time: Time
) -> None:
    await keeper.take()
    working, fencing.redis = fencing.redis, connect("redis://127.0.0.1:1/0")
    await step_until(keeper, lambda: not keeper.held)
    await keeper.write_now(lambda: fencing.report_progress(JOB, progress()))
    fencing.redis = working
    await step_until(keeper, lambda: keeper.held)
    assert await keeper.write(lambda: fencing.report_progress(JOB, progress())) is None
