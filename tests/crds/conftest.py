"""One endpoint with two agents and a job, for the tests that talk to Redis; and an API server with the CRDs."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from api_objects import EXAMPLES, ROOT
from backends import LOCAL, REDIS, LocalWorld, local_world
from redis.asyncio import Redis

from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_contract.connect import command
from coserve_contract.keys import Keys, agent_id
from coserve_contract.messages import Binding, BindingSpec, Checkpoint, Heartbeat, Progress
from coserve_contract.scripts import Binder, Fencing
from coserve_contract.shards import Sample, Shard
from coserve_contract.store import Store

JOB = "job-1"
SHA = "0123456789abcdef" * 4


class Messages:
    """Messages with the least in them."""

    @staticmethod
    def binding(epoch: int, **more: Any) -> Binding:
        spec = BindingSpec(
            job_uid=JOB,
            job_name="gsm8k-json",
            namespace="default",
            adapter_name="gsm8k-json",
            adapter_number=1,
            rank=8,
            alpha=16,
            target_modules=tuple(TargetModule),
            learning_rate=4e-3,
            schedule=Schedule.LINEAR,
            warmup_steps=10,
            batch_size=8,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=0,
            checkpoint_every_steps=20,
            checkpoint_keep=2,
            publish=PublishPolicy.ALWAYS,
        )
        return Binding(epoch=epoch, spec=spec, **more)

    @staticmethod
    def checkpoint(step: int, epoch: int = 1) -> Checkpoint:
        return Checkpoint(step=step, cursor=step, epoch=epoch, path=f"jobs/{JOB}/e{epoch}/s{step}", sha256=SHA)

    @staticmethod
    def progress(epoch: int, step: int) -> Progress:
        return Progress(epoch=epoch, step=step, cursor=step, total_steps=100)

    @staticmethod
    def heartbeat(agent: str) -> Heartbeat:
        pod, boot = agent.split(".")
        return Heartbeat(agent_id=agent, pod_name="tiny-0", pod_uid=pod, boot_id=boot, ready=True)

    @staticmethod
    def shard(seq: int) -> Shard:
        return Shard(seq, 0, SHA, (Sample(1, (seq, 2, 3), (0.0, 1.0, 1.0)), Sample(2, (4, 5), (0.0, 1.0))))


@dataclass
class World:
    """What the operator and two agents hold in their hands."""

    keys: Keys
    redis: Redis
    binder: Binder
    store: Store
    a: Fencing
    b: Fencing

    async def start(self, incarnation: str = "first") -> None:
        """The operator has written the incarnation, and both agents have registered."""
        await self.store.set_incarnation(incarnation)
        for agent in (self.a, self.b):
            agent.register(await agent.heartbeat(Messages.heartbeat(agent.agent)))

    async def expire(self, job: str) -> None:
        """The lease ran out."""
        await command(self.redis, "DEL", self.keys.owner(job))


def new_world(redis: Redis) -> World:
    keys = Keys("endpoint-1")
    a, b = (Fencing(redis, keys, agent_id(pod, "boot-1")) for pod in ("pod-a", "pod-b"))
    return World(keys, redis, Binder(redis, keys), Store(redis, keys), a, b)


@pytest.fixture
def messages() -> type[Messages]:
    return Messages


@pytest.fixture
def make_world() -> Callable[[Redis], World]:
    return new_world


@pytest.fixture
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World | LocalWorld]:
    """An endpoint whose agents have registered; nothing is bound. In Redis, unless the test asks for `BOTH`."""
    if getattr(request, "param", REDIS) == LOCAL:
        local = local_world(tmp_path)
        await local.start()
        yield local
        await local.database.close()
    else:
        client = request.getfixturevalue("redis_server").connect()
        await command(client, "FLUSHALL")
        world = new_world(client)
        await world.start()
        yield world
        await client.aclose()


@pytest.fixture
def now() -> datetime:
    """A time."""
    return datetime(2026, 11, 21, 4, 0, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def api(api_server):
    """The API server with the CRDs of the repository, and no object at the end."""
    for name in ("inferenceendpoints", "finetunejobs"):
        applied = api_server.kubectl("apply", "--server-side", "-f", str(ROOT / "crds" / f"{name}.yaml"))
        assert applied.returncode == 0, applied.stderr
        crd = f"crd/{name}.coserve.dev"
        established = api_server.kubectl("wait", "--for=condition=Established", crd, "--timeout=30s")
        assert established.returncode == 0, established.stderr
    deadline = time.monotonic() + 30
    while api_server.kubectl("get", "coserve").returncode:  # discovery follows a moment later
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield api_server
    api_server.kubectl("delete", "inferenceendpoints,finetunejobs", "--all", "--wait=true")


@pytest.fixture
def objects(api):
    """The two examples, created anew."""
    kinds = "inferenceendpoints,finetunejobs"
    api.kubectl("delete", kinds, "--all", "--wait=true")
    for body in EXAMPLES.values():
        done = api.kubectl("apply", "-f", "-", stdin=json.dumps(body))
        assert done.returncode == 0, done.stderr
    return api
