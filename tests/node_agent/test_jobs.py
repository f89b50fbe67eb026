"""Whole jobs on real agents, engines and Redis: run, killed, stopped, fenced, corrupted, and always the same adapter in the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from coserve_agent.feeder import Feeder, Material
from coserve_agent.settings import FeederSettings
from coserve_agent.tokenizer import Tokenizer
from coserve_api.connect import command
from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_api.keys import Keys
from coserve_api.messages import (
    AdapterRecord,
    Binding,
    BindingSpec,
    Checkpoint,
    Completed,
    Desired,
    Failed,
    Heartbeat,
    Released,
)
from coserve_api.scripts import Binder
from coserve_api.store import JobRecord, Store
from redis.asyncio import Redis

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

    async def agents(self, count: int = 2) -> list[Any]:
        """Agent processes that are ready; `.id` is the agent id."""
        chosen = self.pool.take(count, self.variables)
        for one in chosen:
            one.id = await until(partial(self._ready, one), 90)
        return chosen  # type: ignore[no-any-return]

    async def agent(self, **changes: object) -> Any:
        """One such agent, a new one if settings are to be changed."""
        if not changes:
            return (await self.agents(1))[0]
        program = self.programs.start("main", **self.variables | {"pod_uid": "changed"} | changes)
        program.id = await until(partial(self._ready, program), 90)
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
        binding = Binding(epoch=epoch, spec=spec(job, **changes), resume=resume)
        assert await self.binder.bind(job, agent.id, binding) is None
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

    async def url(self, agent: Any, which: str) -> str:
        async def look() -> str | None:
            line = next((line for line in agent.whole_log.splitlines() if f"{which} port" in line), None)
            return line and line.split(f"{which} port ")[1].split(",")[0]

        return f"http://127.0.0.1:{await until(look)}"

    def check_adapter(self, result: Completed, material: Material) -> str:
        """The published folder is whole and its log has each step's samples exactly once; returns the digest of the weights."""
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


def spec(job: str, **changes: Any) -> BindingSpec:
    values: dict[str, Any] = {
        "job_uid": job,
        "job_name": f"name-of-{job}",
        "namespace": "default",
        "adapter_name": "tuned",
        "adapter_number": 1,
        "rank": 4,
        "alpha": 8,
        "target_modules": tuple(TargetModule),
        "learning_rate": 5e-3,
        "schedule": Schedule.COSINE,
        "warmup_steps": 2,
        "batch_size": 4,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": 3,
        "checkpoint_every_steps": 5,
        "checkpoint_keep": 2,
        "publish": PublishPolicy.ALWAYS,
    }
    return BindingSpec(**values | changes)


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


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, start_programs: Callable[[Path], Any]) -> Iterator[Pool]:
    with start_programs(tmp_path_factory.mktemp("agents")) as programs:
        yield Pool(programs)


@pytest.fixture(scope="module")
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
        "model_path": model_folder,
        "eval_percent": 10,
        "max_sequence_length": 128,
        "batch_size": 4,
        "max_steps": STEPS,
        "seed": 3,
    }
    material = Material.prepare(FeederSettings(**settings), tokenizer)
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
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)


async def test_a_job_becomes_an_adapter_that_answers(cluster: Cluster) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 6)
    await cluster.bind(cluster.a, agent)
    record = await cluster.step_reached(cluster.a, 6)
    assert record.progress is not None
    assert (record.progress.total_steps, record.progress.cursor) == (STEPS, 6)
    assert record.progress.eval_loss_initial is not None
    assert record.progress.tokens_per_second is not None
    assert (await cluster.beat(agent)).jobs.keys() == {cluster.a}
    assert "coserve_job_step" in httpx.get(await cluster.url(agent, "admin") + "/metrics").text
    cluster.feed(cluster.a)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.adapter is not None
    assert (result.step, result.adapter.path) == (STEPS, "adapters/tuned/v1")
    assert result.eval_loss is not None
    assert result.eval_loss_initial is not None
    assert result.eval_loss < result.eval_loss_initial
    assert result.tokens == sum(material.shard(n).tokens for n in range(1, STEPS + 1))
    cluster.check_adapter(result, material)
    folders = sorted(path.name for path in (cluster.artifacts / f"jobs/{cluster.a}/e1").iterdir())
    assert folders == ["s20", f"s{STEPS}"]
    await cluster.store.set_adapters([AdapterRecord(**result.adapter.model_dump(), job_uid=cluster.a, rank=4)])

    async def listed() -> bool:
        return (await cluster.beat(agent)).adapters == {"tuned": 1}

    await until(listed)
    async with openai.AsyncOpenAI(base_url=await cluster.url(agent, "http") + "/v1", api_key="none") as client:
        models = {model.id: model for model in (await client.models.list()).data}
        assert models["tuned"].parent == "base"  # type: ignore[attr-defined]
        options: dict[str, Any] = {"prompt": "one two 3", "max_tokens": 20, "temperature": 0}
        tuned = await client.completions.create(model="tuned", **options)
        base = await client.completions.create(model="base", **options)
    assert tuned.choices[0].text != base.choices[0].text
    assert "three" in tuned.choices[0].text
    metrics = httpx.get(await cluster.url(agent, "admin") + "/metrics").text
    assert 'coserve_tokens_total{kind="backward"}' in metrics


async def test_a_killed_agents_job_goes_on_elsewhere_with_nothing_lost_or_doubled(cluster: Cluster) -> None:
    first, second = await cluster.agents()
    material = cluster.feed(cluster.a)
    await cluster.bind(cluster.a, second)
    undisturbed = await cluster.result(cluster.a)
    assert isinstance(undisturbed, Completed), undisturbed
    expected = cluster.check_adapter(undisturbed, material)
    await cluster.feed_some(cluster.b, 12)
    await cluster.bind(cluster.b, first, adapter_name="killed")
    await cluster.step_reached(cluster.b, 12)
    cluster.feed(cluster.b)
    await asyncio.sleep(0.3)  # somewhere in the middle of what follows
    first.kill()
    record = await cluster.record(cluster.b)
    assert record.result is None
    assert record.checkpoint is not None
    await cluster.bind(cluster.b, second, resume=record.checkpoint, adapter_name="killed")
    result = await cluster.result(cluster.b)
    assert isinstance(result, Completed), result
    assert result.epoch == 2
    assert cluster.check_adapter(result, material) == expected
    assert (result.loss, result.eval_loss, result.tokens) == (
        undisturbed.loss,
        undisturbed.eval_loss,
        undisturbed.tokens,
    )
    assert f"from step {record.checkpoint.step} of 24" in second.log


async def test_a_stopped_job_is_given_back_and_goes_on(cluster: Cluster) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 7)
    binding = await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    assert (
        await cluster.binder.rebrief(cluster.a, agent.id, binding.model_copy(update={"desired": Desired.STOP})) is None
    )
    released = await cluster.result(cluster.a)
    assert isinstance(released, Released), released
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    assert record.checkpoint.step == released.step == 7
    assert record.owner is None
    await asyncio.sleep(1.5)
    assert (await cluster.beat(agent)).jobs == {}
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent, resume=record.checkpoint)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)


async def test_an_agent_told_to_end_gives_its_job_back(cluster: Cluster) -> None:
    agent = await cluster.agent()
    await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    begun = time.monotonic()
    assert await asyncio.to_thread(agent.terminate, 55) == 0
    assert time.monotonic() - begun < 30
    record = await cluster.record(cluster.a)
    assert isinstance(record.result, Released)
    assert record.checkpoint is not None
    assert record.checkpoint.step == record.result.step == 7
    assert agent.id not in (await cluster.store.fleet()).agents


async def test_a_higher_epoch_elsewhere_ends_a_run_that_still_lives(cluster: Cluster) -> None:
    """The first agent is paused longer than its lease lasts, as by a broken node, and wakes up."""
    first, second = await cluster.agents()
    material = await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 7)
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        record = await cluster.record(cluster.a)
        cluster.feed(cluster.a)
        await cluster.bind(cluster.a, second, resume=record.checkpoint)
        result = await cluster.result(cluster.a)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert isinstance(result, Completed), result
    assert result.epoch == 2
    cluster.check_adapter(result, material)

    async def dropped() -> bool:
        return (await cluster.beat(first)).jobs == {} if first.id in (await cluster.store.fleet()).agents else False

    await until(dropped)
    assert (await cluster.record(cluster.a)).result == result
    assert "nothing more is written" in first.log or "its binding is gone" in first.log


async def test_a_corrupt_checkpoint_falls_back_to_the_one_before(cluster: Cluster) -> None:
    first, second = await cluster.agents()
    material = await cluster.feed_some(cluster.a, 11)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 11)
    first.kill()
    cluster.feed(cluster.a)
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    corrupt = cluster.artifacts / record.checkpoint.path / "optimizer.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"\x55")
    await cluster.bind(cluster.a, second)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)
    assert "going on from the older checkpoint of step" in second.log


async def test_a_job_without_a_whole_checkpoint_fails_and_says_so(cluster: Cluster) -> None:
    first, second = await cluster.agents()
    await cluster.feed_some(cluster.a, 6)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 6)
    first.kill()
    for manifest in cluster.artifacts.glob(f"jobs/{cluster.a}/*/*/manifest.json"):
        manifest.unlink()
    await cluster.bind(cluster.a, second)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Failed), result
    assert result.reason == "ArtifactStoreError"
    assert "manifest.json" in result.message


async def test_an_emptied_redis_costs_nothing(cluster: Cluster) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 7)
    binding = await cluster.bind(cluster.a, agent)
    record = await cluster.step_reached(cluster.a, 7)
    await command(cluster.store.redis, "FLUSHALL")
    await asyncio.sleep(2)
    cluster.feed(cluster.a)
    resume = binding.model_copy(update={"resume": record.checkpoint})
    assert await cluster.binder.bind(cluster.a, agent.id, resume) is None
    await cluster.store.set_incarnation("two")
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.epoch == 1
    cluster.check_adapter(result, material)


async def test_an_unbound_job_is_dropped(cluster: Cluster) -> None:
    agent = await cluster.agent()
    await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    await cluster.store.delete_job(cluster.a)

    async def dropped() -> bool:
        return (await cluster.beat(agent)).jobs == {}

    await until(dropped)
    record = await cluster.record(cluster.a)
    assert record.progress is None
    assert record.checkpoint is None


async def test_a_rank_above_the_endpoints_is_refused(cluster: Cluster) -> None:
    agent = await cluster.agent(max_rank=2)
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Failed), result
    assert result.reason == "RankTooLarge"
    assert "2 (finetuning.maxRank)" in result.message


async def test_samples_longer_than_the_context_are_refused(cluster: Cluster) -> None:
    agent = await cluster.agent(max_model_length=64)
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Failed), result
    assert result.reason == "InvalidDataset"
    assert "model.maxModelLength 64" in result.message


async def test_a_wrong_redis_password_is_said_and_serving_goes_on(cluster: Cluster) -> None:
    program = cluster.programs.start("main", **cluster.variables | {"redis_password": "wrong"})
    admin = await cluster.url(program, "admin")

    async def ready() -> bool:
        return httpx.get(f"{admin}/ready").status_code == 200

    await until(ready, 90)
    assert "check COSERVE_REDIS_USERNAME and COSERVE_REDIS_PASSWORD" in program.log
    http = await cluster.url(program, "http")
    body = {"model": "base", "prompt": "one"}
    assert httpx.post(f"{http}/v1/completions", json=body, timeout=30).status_code == 200
    assert httpx.post(f"{http}/v1/completions", json=body | {"model": "tuned"}, timeout=30).status_code == 503
