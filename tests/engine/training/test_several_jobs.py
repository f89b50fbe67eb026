"""Jobs that run together: each as if alone, in shares of their priorities, and never stuck over pages."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.job_messages import (
    ForwardBackward,
    JobFailed,
    OptimStep,
    Pass,
    PassDone,
    SetPriority,
    StartJob,
    StepDone,
    TrainSeq,
)
from coserve_engine.messages import AddRequest, SamplingParams
from coserve_engine.training.jobs import Job

NAMES = ("one", "two", "three")
TINY = {"kv_cache_bytes": 8 * 32768, "max_model_length": 256}
"""7 pages of 64 tokens: two passes of 4 pages do not fit together."""


def stream(training: Any, start_job: Any, name: str, steps: int = 3) -> list[Any]:
    number = NAMES.index(name) + 1
    start = start_job(name, rank=2 * number + 2, seed=number)
    start = replace(start, lora=replace(start.lora, dropout=0.1 * number), priority=float(number))
    return [start, *training(name, seed=number, steps=steps, micros=2)]


@pytest.fixture(scope="module")
def alone(driver: Any, training: Any, start_job: Any) -> dict[str, torch.Tensor]:
    """The adapter that each job has by itself."""
    found = {}
    for name in NAMES:
        d = driver()
        d.submit(*stream(training, start_job, name))
        found[name] = d.run().parameters(name)
    return found


def together(d: Any, streams: dict[str, list[Any]], draw_tokens: Any, seed: int) -> int:
    """Jobs begin at random moments, requests come between, passes are dropped at random; returns the drops."""
    source, requests, drops = random.Random(seed), 0, 0
    waiting = list(streams.values())
    for _ in range(100_000):
        if waiting and source.random() < 0.2:
            d.submit(*waiting.pop())
        if requests < 15 and source.random() < 0.2:
            requests += 1
            params = SamplingParams(source.randint(1, 12), ignore_eos=True)
            d.submit(AddRequest(f"r{requests}", draw_tokens(requests, source.randint(20, 200)), params, d.clock.now))
        if source.random() < 0.05 and d.engine.jobs:
            drops += d.engine.jobs[source.choice(sorted(d.engine.jobs))].drop_youngest()
        d.step(lambda: source.random() < 0.5)
        if not waiting and d.engine.idle:
            return drops
    raise AssertionError("no end")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_adapter_is_the_one_it_has_alone(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any, alone: dict[str, torch.Tensor], count: int
) -> None:
    streams = {name: stream(training, start_job, name) for name in NAMES[:count]}
    d = driver(jitter_s=0.004, seed=count, kv_cache_bytes=15 * 32768)
    drops = together(d, streams, draw_tokens, seed=count)
    assert drops
    assert d.failures == []
    for name in streams:
        assert torch.equal(d.parameters(name), alone[name]), name


def test_a_shared_buffer_breaks_it(
    driver: Any,
    training: Any,
    start_job: Any,
    draw_tokens: Any,
    alone: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: one gradient buffer for jobs of one shape."""
    shared: dict[int, torch.Tensor] = {}
    made = Job.__init__

    def with_shared_gradient(self: Job, *args: Any) -> None:
        made(self, *args)
        self._grad = shared.setdefault(self._grad.numel(), self._grad)

    monkeypatch.setattr(Job, "__init__", with_shared_gradient)
    streams = {"one": stream(training, start_job, "one")}
    other = [replace(c, job="other") for c in stream(training, start_job, "two")]
    streams["other"] = [replace(other[0], lora=streams["one"][0].lora), *other[1:]]
    d = driver(jitter_s=0.004, seed=2, kv_cache_bytes=15 * 32768)
    together(d, streams, draw_tokens, seed=2)
    assert not torch.equal(d.parameters("one"), alone["one"])


def test_half_done_passes_never_wait_for_each_other(driver: Any, draw_tokens: Any, start_job: Any) -> None:
    d = driver(**TINY)
    for name in NAMES:
        seqs = (TrainSeq(0, draw_tokens(1, 250), (0.004,) * 250),)
        work = [ForwardBackward(name, n, Pass(n, name, 0, n, seqs)) for n in range(1, 6)]
        d.submit(start_job(name), *work, OptimStep(name, 6, 1e-3))
    d.run(limit=20_000)
    assert {event.job for event in d.of(StepDone)} == set(NAMES)
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total


@pytest.mark.parametrize("claims_pages", [True, False])
def test_a_job_of_long_passes_gets_its_pages(
    driver: Any, draw_tokens: Any, start_job: Any, monkeypatch: pytest.MonkeyPatch, claims_pages: bool
) -> None:
    """Short passes of another job would take each page that comes free, if it were not for the claim."""
    if not claims_pages:
        monkeypatch.setattr(Job, "pages_wanted", 0)
    d = driver(kv_cache_bytes=10 * 32768)
    short = (TrainSeq(0, draw_tokens(1, 120), (0.01,) * 120),)
    long = tuple(TrainSeq(n, draw_tokens(n, 230), (0.002,) * 230) for n in range(2))
    for name, seqs, count in (("a short", short, 60), ("b long", long, 4)):
        work = [ForwardBackward(name, n, Pass(n, name, 0, n, seqs)) for n in range(1, count + 1)]
        d.submit(start_job(name), *work, OptimStep(name, count + 1, 1e-3))
    d.run(limit=20_000)
    assert [event.job for event in d.of(StepDone)] == (["b long", "a short"] if claims_pages else ["a short", "b long"])


def test_time_is_shared_by_priority(driver: Any, draw_tokens: Any, start_job: Any) -> None:
    """Weights 1, 2 and 3 over equal passes: when the last has done all, the others have done a third and two thirds."""
    d = driver(kv_cache_bytes=4 << 20, max_batch_tokens=64)
    passes = 24
    for number, name in enumerate(NAMES, 1):
        seqs = (TrainSeq(0, draw_tokens(1, 64), (0.01,) * 64),)
        work = [ForwardBackward(name, n, Pass(n, name, 0, n, seqs)) for n in range(1, passes + 1)]
        d.submit(replace(start_job(name), priority=float(number)), *work, OptimStep(name, passes + 1, 1e-3))
    done: Counter[str] = Counter()
    one_unit_a_step = itertools.cycle((False, True))
    for _ in range(2000):
        done.update(event.job for event in d.step(lambda: next(one_unit_a_step)) if isinstance(event, PassDone))
        if "three" in {event.job for event in d.of(StepDone)}:
            break
    assert done["three"] == passes
    assert done["two"] == pytest.approx(passes * 2 / 3, abs=4)
    assert done["one"] == pytest.approx(passes / 3, abs=4)


def test_a_priority_may_change_while_jobs_run(driver: Any, draw_tokens: Any, start_job: Any) -> None:
    """Equal shares until one job's weight is 3; from then on it does three passes where the other does one."""
    d = driver(kv_cache_bytes=4 << 20, max_batch_tokens=64)
    d.submit(SetPriority("one", 2.0))  # no such job yet: it means nothing
    for name in NAMES[:2]:
        seqs = (TrainSeq(0, draw_tokens(1, 64), (0.01,) * 64),)
        work = [ForwardBackward(name, n, Pass(n, name, 0, n, seqs)) for n in range(1, 41)]
        d.submit(start_job(name), *work)
    done: Counter[str] = Counter()
    one_unit_a_step = itertools.cycle((False, True))

    def until(enough: int) -> Counter[str]:
        done.clear()
        while max(done.values(), default=0) < enough:
            done.update(event.job for event in d.step(lambda: next(one_unit_a_step)) if isinstance(event, PassDone))
        return done

    assert min(until(12).values()) >= 10
    d.submit(SetPriority("two", 3.0))
    assert until(24)["one"] == pytest.approx(8, abs=3)
    assert d.failures == []
    d.submit(SetPriority("two", 0.0))
    d.step(lambda: False)
    assert "priority" in d.one(JobFailed).message


@pytest.mark.parametrize("priority", [0.0, -1.0, float("nan"), float("inf")])
def test_a_priority_that_is_no_weight(driver: Any, start_job: Any, priority: float) -> None:
    d = driver()
    d.submit(replace(start_job(), priority=priority))
    assert "priority" in d.run().one(JobFailed).message


def test_commands_wait_for_the_state_of_their_job(driver: Any, training: Any, start_job: Any) -> None:
    """They may come before the job's state is read, and while requests run."""
    d = driver()
    d.submit(start_job(), *training(steps=1))
    assert d.engine.jobs == {}
    assert len(d.run().of(StepDone)) == 1


def test_a_job_whose_state_is_not_read_leaves_the_others(driver: Any, training: Any, start_job: Any) -> None:
    d = driver()
    d.submit(StartJob("bad", start_job().lora, 0, "/nowhere"), start_job(), *training(steps=1))
    d.run()
    assert d.one(JobFailed).job == "bad"
    assert len(d.of(StepDone)) == 1
