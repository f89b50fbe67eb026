"""A pass that needs every page of the pool: it waits while requests hold one, is computed once none does, and changes
neither what they say nor its own bits.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from coserve_engine.messages import (
    AddRequest,
    ForwardBackward,
    OptimStep,
    Pass,
    SamplingParams,
    StepDone,
    TrainSeq,
)

WHOLE = {"kv_cache_bytes": 5 * 32768, "max_model_length": 256}
"""4 pages of 64 tokens, which is one sequence of the longest."""
STEPS = 3


@pytest.fixture
def job(draw_tokens: Any, start_job: Any) -> list[Any]:
    """Steps of one sequence of the longest each."""
    commands = [start_job()]
    for step in range(STEPS):
        work = Pass(step, "job", step, 0, (TrainSeq(step, draw_tokens(step, 256), (0.004,) * 256),))
        commands += [ForwardBackward("job", 2 * step + 1, work), OptimStep("job", 2 * step + 2, 1e-2)]
    return commands


@pytest.fixture
def undisturbed(driver: Any, job: list[Any]) -> torch.Tensor:
    d = driver()
    d.submit(*job)
    return d.run().parameters()


def test_it_waits_for_the_pages_of_requests_and_goes_on_without_them(
    driver: Any, draw_tokens: Any, job: list[Any], undisturbed: torch.Tensor
) -> None:
    d = driver(**WHOLE)
    d.submit(AddRequest("r0", draw_tokens(0, 9), SamplingParams(30, ignore_eos=True), d.clock.now))
    d.step()
    d.submit(*job)
    # One request after the other, each before the last has ended: no moment is the job's.
    for n in range(1, 4):
        while len(d.tokens().get(f"r{n - 1}", ())) < 20:
            d.step()
        d.submit(AddRequest(f"r{n}", draw_tokens(n, 9), SamplingParams(30, ignore_eos=True), d.clock.now))
    while d.engine.requests.running or d.engine.requests.waiting:
        assert not d.engine.executor.passes and not d.of(StepDone)
        d.step()
    assert [len(said) for said in d.tokens().values()] == [30] * 4
    d.run()
    assert [event.step for event in d.of(StepDone)] == [1, 2, 3]
    assert torch.equal(d.parameters(), undisturbed)
    assert d.failures == []


def test_it_uses_the_moments_between_requests(
    driver: Any, draw_tokens: Any, job: list[Any], undisturbed: torch.Tensor
) -> None:
    """Each request comes while a pass is under way, and takes its pages; the pass is computed again."""
    d, source = driver(**WHOLE), random.Random(1)
    d.submit(*job)
    count = 0
    for _ in range(10_000):
        if d.engine.idle:
            break
        began = any(state.fwd_tile for state in d.engine.executor.passes.values())
        if began and count < 2 * len(d.of(StepDone)) + 2:
            count += 1
            d.submit(AddRequest(f"r{count}", draw_tokens(count, 200), SamplingParams(2, ignore_eos=True), d.clock.now))
            d.step()
            assert not any(state.fwd_tile for state in d.engine.executor.passes.values())
        d.step(lambda: source.random() < 0.7)
    assert count == 2 * STEPS
    assert [event.step for event in d.of(StepDone)] == [1, 2, 3]
    assert torch.equal(d.parameters(), undisturbed)
    assert d.failures == []
