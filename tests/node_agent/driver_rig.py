"""A driver on a real engine, with data out of the air and nobody to refuse a checkpoint."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coserve_agent.engine.client import EngineClient
from coserve_agent.jobs.driver import Driver, Plan, Saved
from coserve_agent.jobs.evaluations import EvalRecord
from coserve_agent.jobs.trainlog import DriverState, StepRecord
from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_contract.messages import BindingSpec
from coserve_contract.shards import Sample, Shard
from coserve_engine.config import EngineConfig
from coserve_engine.host import EngineHost
from coserve_engine.messages import StartJob

TOTAL = 8


def sample(number: int) -> Sample:
    length = 6 + number % 11
    tokens = tuple(4 + (number * 31 + n * n) % 300 for n in range(length))
    return Sample(number, tokens, (0.0,) * 3 + (1.0,) * (length - 3))


def shard(number: int) -> Shard:
    return Shard(number, 0, "0" * 64, tuple(sample(4 * number + n) for n in range(4)))


@dataclass
class Source:
    """Shards up to `last`, eval samples from far away."""

    last: int = TOTAL
    asked: list[int] = field(default_factory=list)

    def get(self, number: int) -> Shard | None:
        self.asked.append(number)
        return shard(number) if number <= self.last else None

    async def eval_samples(self) -> list[Sample]:
        return [sample(1000 + n) for n in range(5)]


@dataclass
class Rig:
    """A driver on an engine, and all it said."""

    driver: Driver
    source: Source
    folder: Path
    steps: list[StepRecord] = field(default_factory=list)
    accepted: list[Saved] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    commands: list[Any] = field(default_factory=list)
    at_start: list[Any] = field(default_factory=list)
    started: list[StartJob] = field(default_factory=list)
    fifth_step: asyncio.Event = field(default_factory=asyncio.Event)

    def path(self, step: int) -> Path:
        return self.folder / f"s{step}"


def spec(**changes: Any) -> BindingSpec:
    values: dict[str, Any] = {
        "job_uid": "j",
        "job_name": "job",
        "namespace": "default",
        "adapter_name": "a",
        "adapter_number": 1,
        "rank": 4,
        "alpha": 8,
        "target_modules": tuple(TargetModule),
        "learning_rate": 1e-2,
        "schedule": Schedule.LINEAR,
        "warmup_steps": 0,
        "batch_size": 4,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 1,
        "checkpoint_every_steps": 3,
        "checkpoint_keep": 2,
        "publish": PublishPolicy.ALWAYS,
    }
    return BindingSpec(**values | changes)


@asynccontextmanager
async def running(
    model: Path, kv_cache_bytes: int = 8 << 20, dtype: str = "float32", pass_tokens: int = 512
) -> AsyncIterator[EngineClient]:
    sizes = {"max_model_length": 256, "kv_cache_bytes": kv_cache_bytes, "pass_tokens": pass_tokens}
    config = EngineConfig(str(model), dtype=dtype, **sizes)
    client = EngineClient(EngineHost.start(config))
    client.start()
    try:
        await asyncio.wait_for(client.ready(), 90)
        yield client
    finally:
        await client.close()


MakeRig = Callable[..., AbstractAsyncContextManager[Rig]]


def rigs(tmp_path: Path) -> MakeRig:
    """Drivers of jobs that write below `tmp_path`."""
    names = itertools.count()
    pass_ids = itertools.count(1)

    @asynccontextmanager
    async def make(
        client: EngineClient, resume: Path | None = None, last: int = TOTAL, **changes: Any
    ) -> AsyncIterator[Rig]:
        source, name = Source(last), f"job-{next(names)}"
        channel = client.open_job(name)

        async def accept(saved: Saved) -> None:
            made.accepted.append(saved)

        def on_step(record: StepRecord, state: DriverState) -> None:
            assert state.step == record.step
            made.steps.append(record)
            if record.step == 5:
                made.fifth_step.set()

        binding, start = spec(**changes), None
        if binding.start is not None:
            start = tmp_path / binding.start.path
        bounds, folder = client.pass_bounds, tmp_path / name
        plan = Plan(name, binding, TOTAL, 256, bounds, "base", "{}", lambda step: folder / f"s{step}", start)
        evals: list[EvalRecord] = []
        driver = Driver(plan, channel, source, accept=accept, on_step=on_step, pass_ids=pass_ids, on_eval=evals.append)
        made = Rig(driver, source, tmp_path / name, evals=evals)
        submit = channel.submit
        channel.submit = lambda command: (made.commands.append(command), submit(command))[1]  # type: ignore[method-assign]
        try:
            await driver.start(resume)
            made.at_start = list(made.commands)
            made.started = [command for command in made.commands if isinstance(command, StartJob)]
            made.commands.clear()
            yield made
        finally:
            await driver.close()
            channel.close()

    return make
