"""The operator's side by hand, feeders as tasks, and agents as processes that are used again while they live."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_programs import START_S
from binding_specs import binding_spec
from data_rows import renderer_of
from redis.asyncio import Redis

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.concurrency import end
from coserve_agent.data.material import Material
from coserve_agent.feeder import Feeder
from coserve_agent.settings import FeederSettings
from coserve_contract.keys import Keys
from coserve_contract.messages import (
    Binding,
    Checkpoint,
    Completed,
    Failed,
    Heartbeat,
    Released,
)
from coserve_contract.scripts import Binder
from coserve_contract.store import JobRecord, Store

ENDPOINT = "endpoint-1"
STEPS = 24


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := await condition()):
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.05)
    return value


@dataclass
class Cluster:
    """The operator's side by hand, feeders as tasks, agents as processes that are used again while they live."""

    store: Store
    binder: Binder
    pool: Any
    programs: Any
    variables: dict[str, object]
    a: str
    b: str
    artifacts: Path
    material: Material
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    steps: int = STEPS
    endpoint_uid: str = ENDPOINT

    async def until(self, condition: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
        """The first true value of `condition`."""
        return await until(condition, seconds)

    async def agents(self, count: int = 2) -> list[Any]:
        """Agent processes that are ready; `.id` is the agent id."""
        chosen = self.pool.take(count, self.variables)
        for one in chosen:
            one.id = await until(partial(self._ready, one), START_S)
        return chosen  # type: ignore[no-any-return]

    async def agent(self, **changes: object) -> Any:
        """One such agent, a new one if settings are to be changed."""
        if not changes:
            return (await self.agents(1))[0]
        program = self.programs.start("main", **self.variables | {"pod_uid": "changed"} | changes)
        program.id = await until(partial(self._ready, program), START_S)
        return program

    async def _ready(self, program: Any) -> str | None:
        assert program.process.poll() is None, program.log
        agents = (await self.store.fleet()).agents
        pod = program.variables["pod_uid"]
        return next((one for one, beat in agents.items() if beat.pod_uid == pod and beat.ready and not beat.jobs), None)

    def feed(self, job: str) -> Material:
        """A feeder that feeds everything."""
        self.tasks.append(asyncio.create_task(Feeder(self.store, job, self.material).run()))
        return self.material

    async def feed_some(self, job: str, last: int) -> Material:
        """What a feeder would have pushed by now, so that the job waits after step `last`."""
        await self.store.set_feed(job, self.material.status())
        for number in range(1, self.material.eval_shards + 1):
            await self.store.push_eval(job, self.material.eval_shard(number))
        for number in range(1, last + 1):
            await self.store.push_shard(job, self.material.shard(number))
        return self.material

    async def bind(self, job: str, agent: Any, resume: Checkpoint | None = None, **changes: Any) -> Binding:
        epoch = changes.pop("epoch", self.epochs.get(job, 0) + 1)
        self.epochs[job] = epoch
        binding = Binding(epoch=epoch, spec=binding_spec(job, **changes), resume=resume)
        refused = await self.binder.bind(job, agent.id, binding)
        assert refused is None, f"{job} epoch {epoch}: {refused}"
        return binding

    async def record(self, job: str) -> JobRecord:
        record = await self.store.job(job)
        assert not record.broken
        return record

    async def result(self, job: str, seconds: float = 90) -> Completed | Failed | Released:
        async def look() -> Completed | Failed | Released | None:
            return (await self.record(job)).result

        return await until(look, seconds)  # type: ignore[no-any-return]

    async def step_reached(self, job: str, step: int) -> JobRecord:
        async def look() -> JobRecord | None:
            record = await self.record(job)
            assert record.result is None, record.result
            return record if record.progress and record.progress.step >= step and record.checkpoint else None

        return await until(look)  # type: ignore[no-any-return]

    async def beat(self, agent: Any) -> Heartbeat:
        return (await self.store.fleet()).agents[agent.id]

    async def metrics(self, agent: Any) -> str:
        async with httpx.AsyncClient(base_url=await self.url(agent, "admin")) as client:
            return (await client.get("/metrics")).text

    async def url(self, agent: Any, which: str) -> str:
        async def look() -> str | None:
            line = next((line for line in agent.whole_log.splitlines() if f"{which} port" in line), None)
            return line and line.split(f"{which} port ")[1].split(",")[0]

        return f"http://127.0.0.1:{await until(look)}"

    def check_adapter(self, result: Completed, material: Material) -> str:
        """The published folder is whole and its log has each step's samples exactly once; returns the digest of the
        weights.
        """
        assert result.adapter is not None
        folder = self.artifacts / result.adapter.path
        manifest = (folder / "manifest.json").read_bytes()
        assert hashlib.sha256(manifest).hexdigest() == result.adapter.sha256
        rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for row in rows:
            assert row["samples"] == [sample.id for sample in material.shard(row["step"]).samples]
            assert row["tokens"] == material.shard(row["step"]).tokens
            assert row["loss"] > 0
            assert row["grad_norm"] > 0
        return str(json.loads(manifest)["files"]["adapter_model.safetensors"]["sha256"])


@dataclass
class Pool:
    """Agents that outlive a test, since starting one takes seconds."""

    programs: Any
    started: int = 0

    def take(self, count: int, variables: dict[str, object]) -> list[Any]:
        living = [one for one in self.programs.running if one.process.poll() is None]
        while len(living) < count:
            self.started += 1
            living.append(self.programs.start("main", **variables | {"pod_uid": f"pod-{self.started}"}))
        for one in living:
            one.forget_log()
        return living[:count]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, servers: Any) -> Iterator[Any]:
    """One of their own: agents that are used again beat on in it while other tests run."""
    with servers.redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, start_programs: Callable[[Path], Any]) -> Iterator[Pool]:
    with start_programs(tmp_path_factory.mktemp("agents")) as programs:
        yield Pool(programs)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
async def cluster(
    redis: Redis,
    redis_server: Any,
    pool: Pool,
    programs: Any,
    model_folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    artifacts: Path,
) -> AsyncIterator[Cluster]:
    keys = Keys(ENDPOINT)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"one two {n % 7}", "completion": " three four" * (2 + 4 * (n % 9))} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    settings: dict[str, Any] = {
        "redis_url": redis_server.url,
        "endpoint_uid": ENDPOINT,
        "job_uid": "x",
        "job_name": "x",
        "dataset_path": data,
        "dataset_root": tmp_path,
        "model_path": model_folder,
        "eval_percent": 10,
        "max_sequence_length": 128,
        "batch_size": 4,
        "max_steps": STEPS,
        "seed": 3,
    }
    material = Material.prepare(FeederSettings(**settings), renderer_of(tokenizer), tokenizer.size)
    variables = {
        "endpoint_uid": ENDPOINT,
        "model_path": model_folder,
        "model_name": "base",
        "max_model_length": 256,
        "artifacts": artifacts,
        "redis_url": redis_server.url,
        "redis_password": redis_server.password,
        "host": "127.0.0.1",
        "http_port": 0,
        "admin_port": 0,
        "kv_cache_bytes": 16 << 20,
    }
    store = Store(redis, keys)
    name = uuid.uuid4().hex[:8]
    await store.set_incarnation(name)
    made = Cluster(store, Binder(redis, keys), pool, programs, variables, f"{name}-a", f"{name}-b", artifacts, material)
    yield made
    await end(*made.tasks)
