"""Whatever time a device takes to hand numbers back, a job's bits and events stay, and nothing waits for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from coserve_engine.config import LINEARS
from coserve_engine.device.fake import Delayed, FakeDevice
from coserve_engine.messages import (
    ForwardBackward,
    JobStopped,
    LoraSpec,
    OptimStep,
    Pass,
    PassDone,
    PassMode,
    StartJob,
    StepDone,
    StopJob,
    TrainSeq,
)
from coserve_engine.numerics import Numerics

CPU = torch.device("cpu")
TIGHT = {"kv_cache_bytes": 45 * 8192, "max_model_length": 256, "numerics": Numerics(page=16)}


@pytest.fixture
def job(driver: Callable[..., Any], draw_tokens: Any) -> Callable[..., Any]:
    """An engine with a job of three steps, each of two passes and an evaluation that wants log-probabilities."""

    def make(device: FakeDevice | None, **settings: Any) -> Any:
        d = driver(jitter_s=1e-5, **settings)
        if device is not None:
            d.engine.executor.copies = device
        d.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS, 0.1), 1, None))
        d.step()
        number = 0
        for _ in range(3):
            for mode in (PassMode.TRAIN, PassMode.TRAIN, PassMode.EVAL):
                number += 1
                seqs = tuple(
                    TrainSeq(n, draw_tokens(n + number, size), (0.1,) * size) for n, size in enumerate((70, 9))
                )
                work = Pass(number, "job", 0, 0, seqs, mode)
                d.submit(ForwardBackward("job", number, work, want_logprobs=True))
            number += 1
            d.submit(OptimStep("job", number, 1e-2))
        return d

    return make


def story(d: Any) -> list[Any]:
    """What its driver is told, in order."""
    return [event for event in d.events if isinstance(event, PassDone | StepDone)]


@pytest.mark.parametrize("settings", [{}, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("seed", range(3))
def test_late_numbers_change_nothing(job: Callable[..., Any], seed: int, settings: dict[str, Any]) -> None:
    now = job(None, **settings).run()
    device = FakeDevice(CPU, random.Random(seed))
    late = job(device, **settings).run()
    assert len(story(now)) == 12
    assert story(late) == story(now)
    assert torch.equal(late.parameters(), now.parameters())
    assert device.early > 0
    assert device.waits == 0


def test_a_reader_that_does_not_ask_is_found_out(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(Delayed, "ready", lambda self: True)
    device = FakeDevice(CPU)
    job(device).run()
    assert device.waits > 0


def test_a_job_that_is_stopped_says_of_its_step(job: Callable[..., Any]) -> None:
    """A step that was enqueued counts: its event comes before the end, for which nobody waits."""
    device = FakeDevice(CPU)
    d = job(device)
    steps = d.engine.jobs["job"]
    while steps.step == 0:
        d.step()
    steps._stepped.looks = 5  # still on its way
    assert d.of(StepDone) == []
    d.submit(StopJob("job", None))
    d.run()
    assert d.one(StepDone).step == d.one(JobStopped).step == 1
    assert device.waits == 0
