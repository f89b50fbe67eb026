"""A job that is stopped anywhere and goes on in another engine ends with the bits of one that was never stopped."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine.config import EngineConfig
from coserve_engine.host import EngineHost
from coserve_engine.messages import (
    CheckpointDone,
    JobStarted,
    JobStopped,
    OptimStep,
    PassDone,
    SaveCheckpoint,
    StepDone,
    StopJob,
)
from coserve_engine.training.jobs import Job

STEPS, MICROS = 6, 3


@pytest.fixture
def undisturbed(driver: Any, training: Any, start_job: Any) -> torch.Tensor:
    d = driver()
    d.submit(start_job(), *training(steps=STEPS, micros=MICROS))
    return d.run().parameters()


def stop_after(d: Any, events: int, source: random.Random, checkpoint: Path) -> None:
    """Run until so many events of the job came, a little further, and stop."""
    while len(d.of(PassDone)) + len(d.of(StepDone)) < events:
        d.step(lambda: source.random() < 0.5)
    for _ in range(source.randint(0, 3)):
        d.step(lambda: source.random() < 0.5)
    d.submit(StopJob("job", str(checkpoint), {"driver.json": "{}"}))
    d.run()


@pytest.mark.parametrize("seed", range(6))
def test_stopped_at_a_random_moment(
    driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, tmp_path: Path, seed: int
) -> None:
    source = random.Random(seed)
    commands, resume, steps_before = training(steps=STEPS, micros=MICROS), None, 0
    for part in range(3):
        d = driver(jitter_s=0.004, seed=seed)
        d.submit(start_job(resume=resume), *commands)
        folder = tmp_path / f"s{part}"
        stop_after(d, source.randint(1, 6), source, folder)
        started, stopped = d.one(JobStarted), d.one(JobStopped)
        assert started.step == steps_before
        assert started.files == ({"driver.json": "{}"} if resume else {})
        assert stopped.checkpoint is not None
        steps_before, resume = stopped.step, str(folder)
        assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total
    d = driver()
    d.submit(start_job(resume=resume), *commands)
    assert torch.equal(d.run().parameters(), undisturbed)
    assert d.of(StepDone)[-1].step == STEPS


@pytest.mark.parametrize("at", range(0, STEPS * (MICROS + 1) + 1, 3))
def test_a_checkpoint_anywhere_in_the_stream(
    driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, tmp_path: Path, at: int
) -> None:
    """Between two passes of a step it covers the steps before: the passes are computed again."""
    commands: list[Any] = training(steps=STEPS, micros=MICROS)
    commands.insert(at, SaveCheckpoint("job", 0, str(tmp_path / "c")))
    stream = [replace(command, seq_no=number) for number, command in enumerate(commands, 1)]
    d = driver(jitter_s=0.004, seed=at)
    d.submit(start_job(), *stream)
    assert torch.equal(d.run().parameters(), undisturbed)
    done = d.one(CheckpointDone)
    assert done.step == sum(isinstance(command, OptimStep) for command in stream[:at])
    resumed = driver()
    resumed.submit(start_job(resume=done.path), *stream)
    assert torch.equal(resumed.run().parameters(), undisturbed)


def with_checkpoints(commands: list[Any], folder: Path) -> list[Any]:
    """A checkpoint after every optimizer step."""
    stream: list[Any] = []
    for command in commands:
        stream.append(command)
        if isinstance(command, OptimStep):
            stream.append(SaveCheckpoint("job", 0, str(folder / f"s{len(stream)}")))
    return [replace(command, seq_no=number) for number, command in enumerate(stream, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_killed_between_two_units(
    driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, tmp_path: Path, seed: int
) -> None:
    """Nothing is said to the job: the last checkpoint is all that is left, again and again."""
    source, resume = random.Random(seed), None
    stream = with_checkpoints(training(steps=STEPS, micros=MICROS), tmp_path)
    for _ in range(3):
        d = driver(jitter_s=0.004, seed=seed)
        d.submit(start_job(resume=resume), *stream)
        units = 0
        limit = source.randint(10, 40)
        while units < limit and not d.engine.idle:
            one_unit = iter((False, True))
            d.step(lambda left=one_unit: next(left, True))
            units += 1
        saved = d.of(CheckpointDone)
        resume = saved[-1].path if saved else resume
        d.engine._files._thread.shutdown()
    assert resume is not None
    d = driver()
    d.submit(start_job(resume=resume), *stream)
    assert torch.equal(d.run().parameters(), undisturbed)


def test_a_killed_process(
    plain: str, driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, tmp_path: Path
) -> None:
    stream = with_checkpoints(training(steps=STEPS, micros=MICROS), tmp_path)
    host = EngineHost.start(EngineConfig(plain, max_model_length=256, kv_cache_bytes=2 << 20))
    for command in (start_job(), *stream):
        host.submit(command)
    saved: list[CheckpointDone] = []
    while len(saved) < 2 and host.alive:
        saved += [event for event in host.events(0.2) if isinstance(event, CheckpointDone)]
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    host.close()
    d = driver()
    d.submit(start_job(resume=saved[-1].path), *stream)
    assert torch.equal(d.run().parameters(), undisturbed)
    assert d.one(JobStarted).step >= 2


def test_without_the_moments_it_fails(
    driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, tmp_path: Path
) -> None:
    commands = training(steps=STEPS, micros=MICROS)
    d = driver()
    d.submit(start_job(), *commands[: 2 * (MICROS + 1)])
    d.run()
    d.submit(StopJob("job", str(tmp_path / "c")))
    d.run()
    resumed = driver()
    resumed.submit(start_job(resume=str(tmp_path / "c")))
    resumed.run()
    job: Job = resumed.engine.jobs["job"]
    job._state.adam.m.zero_()
    resumed.submit(*commands)
    assert not torch.allclose(resumed.run().parameters(), undisturbed, rtol=1e-3)
