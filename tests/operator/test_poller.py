"""What of Redis is read, and when: what was marked at once, a lost agent, and everything now and then."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import Desired, FeedStatus, Released
from coserve_contract.scripts import Binder, Fencing
from coserve_contract.store import JobRecord, Store
from coserve_operator.decide.binding import binding_of
from coserve_operator.decide.observed import RedisView
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB
from coserve_operator.queue import BackOff, KeyedQueue
from coserve_operator.redis.poller import Poller
from coserve_operator.redis.store import SETTLE_S, OperatorStore
from coserve_operator.watch.cache import Cache

FULL_S, COUNT = 10.0, 3


class Pace:
    def progress_s(self) -> float:
        return 4.0

    def load_s(self) -> float:
        return 20.0


@dataclass
class World:
    """Endpoints with an agent each that beats, and one job of the first; `poll` returns what was read."""

    make: Any
    redis: Redis
    clock: list[float] = field(default_factory=lambda: [100.0])

    async def begin(self) -> World:
        clock = lambda: self.clock[0]  # noqa: E731
        self.cache = Cache()
        self.store = OperatorStore(self.redis, b"k", clock)
        self.queue: KeyedQueue[Any] = KeyedQueue(clock, BackOff(random.Random(1)))
        self.poller = Poller(self.cache, self.store, self.queue, FULL_S, Pace())
        self.reads: list[list[str]] = []
        read = self.store.read

        async def counted(wants: Any) -> dict[str, Any]:
            self.reads[-1] += sorted(wants)
            return await read(wants)

        self.store.read = counted  # type: ignore[method-assign]
        self.agents = {}
        for number in range(COUNT):
            uid = f"e-{number}"
            self.cache.put(ENDPOINT, self.make.endpoint_body(f"end-{number}", uid))
            await Store(self.redis, Keys(uid)).set_incarnation("i")
            self.agents[uid] = Fencing(self.redis, Keys(uid), self.make.agent_of("p1"))
            self.agents[uid].register("i")
            await self.beat(uid)
        self.cache.put(FINETUNE_JOB, self.make.job_body(endpointRef={"name": "end-0"}))
        await self.poll()
        self.clock[0] += SETTLE_S
        assert await self.poll() == ["e-0", "e-1", "e-2"], "until it is settled all are read"
        while self.queue._schedule.pop(1e9) is not None:
            pass
        return self

    async def beat(self, uid: str, **more: Any) -> None:
        await self.agents[uid].heartbeat(self.make.heartbeat("p1", **more))

    async def poll(self) -> list[str]:
        self.reads.append([])
        await self.poller.poll({f"e-{number}": (self.make.NAMESPACE, f"end-{number}") for number in range(COUNT)})
        return self.reads[-1]

    def due(self, within_s: float = 0.0) -> list[str]:
        """The endpoints that are to be reconciled by then."""
        schedule, by = self.queue._schedule, self.clock[0] + within_s
        due = {key for key, at in schedule._due.items() if at <= by}
        return sorted(name for _, name in due.union(*schedule._urgent.values()))

    def forget(self) -> None:
        """Nothing is to be reconciled."""
        self.queue._schedule.__init__()  # type: ignore[misc]


@pytest.fixture
async def world(make: Any, redis: Redis) -> World:
    return await World(make, redis).begin()


async def test_nothing_is_read_that_says_of_no_change(world: World) -> None:
    await world.beat("e-1", saturation=80.0)
    assert (await world.poll(), world.due()) == ([], [])


@pytest.mark.parametrize(
    "change",
    [{"ready": False}, {"draining": True}, {"error": "x"}, {"adapters": {"a": 1}}, {"jobs": {"j-1": (1, 0)}}],
    ids=str,
)
async def test_what_an_agent_changes_is_read_at_once_and_alone(world: World, change: dict[str, Any]) -> None:
    await world.beat("e-1", **change)
    assert (await world.poll(), world.due()) == (["e-1"], ["end-1"])
    if "jobs" not in change:
        await world.beat("e-1", **change)
        assert await world.poll() == []


async def test_what_a_feeder_says_and_how_a_job_ends_is_read_at_once(world: World) -> None:
    store, agent, job = Store(world.redis, Keys("e-0")), world.agents["e-0"], "j-1"
    await store.set_feed(job, FeedStatus(total_steps=10))
    assert (await world.poll(), world.due()) == (["e-0"], ["end-0"])
    await store.set_feed(job, FeedStatus(total_steps=10))
    assert await world.poll() == []
    binding = binding_of(world.make.job(), world.make.endpoint(), 1, Desired.RUN, 1, 0, JobRecord())
    assert await Binder(world.redis, Keys("e-0")).bind(job, agent.agent, binding) is None
    await agent.take_lease(job, 1)
    assert await agent.finish(job, Released(epoch=1, step=0)) is None
    assert await world.poll() == ["e-0"]
    await agent.leave()
    assert await world.poll() == ["e-0"]


async def test_an_agent_that_is_lost_is_seen_by_its_last_heartbeat(world: World) -> None:
    keys = Keys("e-2")
    await command(world.redis, "ZADD", keys.agents(), 1, world.agents["e-2"].agent)
    await command(world.redis, "DEL", keys.agent(world.agents["e-2"].agent))
    assert (await world.poll(), world.due()) == (["e-2"], ["end-2"])


async def test_an_agent_that_marks_nothing_is_read_in_time(world: World) -> None:
    """As one of the version before."""
    beat = world.make.heartbeat("p1", ready=False)
    await command(world.redis, "SET", Keys("e-1").agent(beat.agent_id), beat.dumps(), "PX", 5000)
    assert await world.poll() == []
    world.clock[0] += FULL_S
    assert (await world.poll(), world.due()) == (["e-0", "e-1", "e-2"], ["end-1"])


async def test_figures_are_looked_at_as_often_as_they_are_written(world: World) -> None:
    await world.beat("e-1", saturation=80.0)
    await world.beat("e-0", jobs={"j-1": (1, 0)})
    await world.poll()
    world.forget()
    keys = Keys("e-0")
    await command(world.redis, "SET", keys.progress("j-1"), world.make.progress(1, 5).dumps())
    world.clock[0] += Pace().progress_s()
    assert await world.poll() == ["e-0"], "its job runs"
    assert (world.due(3.9), world.due(4.0)) == ([], ["end-0"])
    world.clock[0] += FULL_S
    await world.poll()
    assert (world.due(19.9), world.due(20.0)) == (["end-0"], ["end-0", "end-1"])


async def test_what_the_operator_writes_is_read_again(world: World) -> None:
    await world.store.register("e-1", ["j-9"])
    assert (await world.poll(), world.due()) == (["e-1"], ["end-1"])
    assert await world.poll() == []


async def test_a_mark_of_another_type_disturbs_nobody(world: World) -> None:
    await command(world.redis, "DEL", Keys("e-1").changed())
    await command(world.redis, "LPUSH", Keys("e-1").changed(), "x")
    assert await world.poll() == ["e-1"]
    assert await world.poll() == []


async def test_what_does_not_read_is_read_again_in_time_whatever_it_marks(world: World) -> None:
    """The others' time is not the tenant's to take."""
    keys = Keys("e-1")
    agents = await command(world.redis, "DUMP", keys.agents())
    await command(world.redis, "DEL", keys.agents())
    await command(world.redis, "SET", keys.agents(), "x" * 100)
    await command(world.redis, "SET", keys.changed(), "another")
    assert (await world.poll(), world.due()) == (["e-1"], ["end-1"])
    await command(world.redis, "SET", keys.changed(), "and another")
    await world.store.register("e-1", ["j-9"])
    assert await world.poll() == []
    await command(world.redis, "DEL", keys.agents())
    await command(world.redis, "RESTORE", keys.agents(), 0, agents)
    world.forget()
    world.clock[0] += FULL_S
    assert (await world.poll(), world.due()) == (["e-0", "e-1", "e-2"], ["end-1"])
    found = await world.store.read({"e-1": []})
    assert isinstance(found["e-1"], RedisView)
