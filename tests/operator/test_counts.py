"""What a pass costs, counted: calls of the API server, commands of Redis, and lines of our own code that run. Of twice
as many jobs it costs twice as much, and of jobs that are over nothing.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from operator_fakes import FakeKube
from redis.asyncio import Redis

from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import FeedStatus, Heartbeat
from coserve_contract.scripts import Fencing
from coserve_contract.store import Store
from coserve_operator.apply.budget import BURST_S, QUEUE, StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.controller import Controller
from coserve_operator.kube import FINETUNE_JOB
from coserve_operator.redis.store import SETTLE_S
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.watch.cache import Cache

ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "operator"), str(ROOT / "crds"))
UID, GROUP = "e-1", ("ml", "tiny")
FEW, TWICE, FOUR_TIMES = 20, 40, 80


@dataclass
class Cost:
    calls: int
    """Of the API server."""
    commands: int
    """Of Redis."""
    lines: int
    """Of our code."""


class Leads:
    def token(self) -> int:
        return 1

    async def raise_above(self, token: int) -> None:
        raise AssertionError(token)


class CountingKube(FakeKube):
    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self.calls: Counter[str] = Counter()

    def _call(self) -> None:
        self.calls["all"] += 1
        super()._call()


class World:
    """One endpoint with jobs that run, wait and are over; `cost` counts what one pass takes."""

    def __init__(self, make: Any, redis: Redis) -> None:
        self.make, self.redis, self.clock = make, redis, [0.0]
        self.cache = Cache()
        self.kube = CountingKube(self.cache)
        clock = lambda: self.clock[0]  # noqa: E731
        stores = Stores(Settings(), Leads(), clock)
        stores.of(GROUP[0]).redis = redis
        self.controller = Controller(
            Settings(), self.kube, stores, self.cache, Applier(self.kube, clock), StatusBudget(clock),
            Recorder(self.kube, "test"), MetricsSlotKeeper(self.kube, ("ns", "metrics"), clock, lambda: None),
            lambda: make.NOW,
        )  # fmt: skip
        self.kube.put(make.endpoint_body(replicas=1))
        self.beats: list[Heartbeat] = []

    async def fill(self, *, running: int = 0, waiting: int = 0, over: int = 0) -> World:
        """Bring that many jobs to where they stay."""
        for number in range(running):
            self.beats.append(self.make.heartbeat(f"p{number}"))
        for number in range(1, running + waiting + 1):
            self.kube.put(self.make.job_body(f"job-{number:04d}", number=number))
            await Store(self.redis, Keys(UID)).set_feed(f"j-{number}", FeedStatus(total_steps=10))
        await self.beat()
        await self.run()
        self.clock[0] += SETTLE_S
        for _ in range(4):
            await self.beat()
            await self.run()
        states = Counter(job.status.state for job in self.cache.group(GROUP).jobs)
        assert states == Counter({"Running": running, "Pending": waiting}), states
        self.finish(over)
        await self.run()
        return self

    def finish(self, count: int) -> None:
        """Add jobs that were over before."""
        for number in range(10_000, 10_000 + count):
            told = [
                {"type": kind, "status": "True", "reason": "Completed", "message": "", "observedGeneration": 1,
                 "lastTransitionTime": "2026-11-21T12:00:00Z"}
                for kind in ("Complete", "Finished")
            ]  # fmt: skip
            status = {
                "state": "Complete", "observedGeneration": 1, "completionTime": "2026-11-21T12:00:00Z",
                "conditions": told,
            }  # fmt: skip
            body = self.make.job_body(f"job-{number}", number=1, status=status)
            body["metadata"] |= {"uid": f"j-{number}", "creationTimestamp": "2026-11-21T11:00:00Z"}
            self.kube.put(body)

    async def beat(self) -> None:
        for beat in self.beats:
            await Fencing(self.redis, Keys(UID), beat.agent_id, heartbeat_ttl_ms=600_000).heartbeat(beat)

    async def run(self) -> None:
        await self.controller.reconcile(GROUP)

    async def cost(self) -> Cost:
        """Of a pass in which nothing has changed."""
        await self.run()
        lines, calls, before = 0, self.kube.calls["all"], await self._processed()

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.startswith(OURS):
                return None
            lines += event == "line"
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            await self.run()
        finally:
            sys.settrace(old)
        return Cost(self.kube.calls["all"] - calls, await self._processed() - before - 1, lines)

    async def _processed(self) -> int:
        info = await command(self.redis, "INFO", "stats")
        text = info if isinstance(info, dict) else dict(
            line.split(":", 1) for line in info.decode().splitlines() if ":" in line
        )  # fmt: skip
        return int(text["total_commands_processed"])


async def costs(make: Any, redis: Redis, what: str) -> list[Cost]:
    found = []
    for count in (FEW, TWICE, FOUR_TIMES):
        await command(redis, "FLUSHALL")
        found.append(await (await World(make, redis).fill(**{what: count})).cost())
    print(what, found)
    return found


@pytest.mark.parametrize("what", ["running", "waiting"])
async def test_a_pass_costs_in_proportion_to_its_jobs(make: Any, redis: Redis, what: str) -> None:
    few, twice, four = await costs(make, redis, what)
    assert [each.calls for each in (few, twice, four)] == [0, 0, 0], "nothing has changed"
    assert four.commands - twice.commands == 2 * (twice.commands - few.commands)
    assert four.lines - twice.lines <= 2.1 * (twice.lines - few.lines)


async def test_jobs_that_are_over_cost_nothing(make: Any, redis: Redis) -> None:
    few, twice, four = await costs(make, redis, "over")
    assert few == twice == four


async def test_one_agent_that_becomes_ready_writes_the_status_of_one_job(make: Any, redis: Redis) -> None:
    """Though the places of all others in the queue change: those are told little by little."""
    world = await World(make, redis).fill(waiting=FOUR_TIMES)
    written: list[str] = []
    apply = world.kube.apply

    async def counted(body: Any, subresource: Any = None) -> Any:
        if body["kind"] == "FinetuneJob":
            written.append(body["metadata"]["name"])
        return await apply(body, subresource)

    world.kube.apply = counted  # type: ignore[method-assign]
    world.beats.append(make.heartbeat("p1"))
    await world.beat()
    await world.run()
    assert written == ["job-0001", "job-0003"], "the one that is bound, and the one that is fed now"
    assert world.cache.group(GROUP).jobs[1].status.queue_position == 2
    world.clock[0] += 600.0
    await world.run()
    assert 2 < len(written) <= 2 + QUEUE.per_s * BURST_S
    assert world.cache.group(GROUP).jobs[1].status.queue_position == 1


def test_ten_thousand_jobs_that_are_over_take_little_memory(make: Any) -> None:
    world, count = World(make, Redis()), 2000
    world.finish(1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000, 20_000 + count):
            told = [{"type": kind, "status": "True", "reason": "Completed", "message": "", "observedGeneration": 1,
                     "lastTransitionTime": "2026-11-21T12:00:00Z"} for kind in ("Complete", "Finished")]  # fmt: skip
            uri = f"pvc://artifacts/store/adapters/0a6e5c9e-2a57-4d0e-9a5e-1d2f3c4b5a69/adapter-{number}/v1"
            body = make.job_body(f"job-{number}", number=1, ttlSecondsAfterFinished=3600, status={
                "state": "Complete", "observedGeneration": 1, "completionTime": "2026-11-21T12:00:00Z",
                "conditions": told, "adapter": {"name": f"adapter-{number}", "version": 1, "uri": uri,
                                                "sha256": f"{number:064d}"},
                "checkpoint": {"step": 1, "cursor": 1, "epoch": 1, "uri": uri, "sha256": f"{number:064d}"},
            })  # fmt: skip
            body["metadata"] |= {"uid": f"0a6e5c9e-2a57-4d0e-9a5e-{number:012d}", "resourceVersion": str(number)}
            world.cache.put(FINETUNE_JOB, body)
        each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert each < 2000
