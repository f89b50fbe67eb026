"""A job's parameters are the same bits however its passes were dropped, replayed or interleaved, and by another job."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from coserve_engine.messages import AddRequest, ForwardBackward, PassDone, SamplingParams, StepDone
from coserve_engine.model.passes import PassState
from coserve_engine.model.transformer import Transformer
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler import schedule
from coserve_engine.training.jobs import Job

STEPS = 8
TIGHT = {"kv_cache_bytes": 45 * 8192, "max_model_length": 256, "numerics": Numerics(page=16)}
"""44 pages of 16 tokens: a pass of 30 pages and a request of 15 do not fit together."""


@pytest.fixture
def undisturbed(driver: Any, training: Any, start_job: Any) -> torch.Tensor:
    d = driver()
    d.submit(start_job(), *training(steps=STEPS))
    d.run()
    assert len(d.of(StepDone)) == STEPS
    return d.parameters()


@pytest.fixture
def drops(monkeypatch: pytest.MonkeyPatch) -> list[PassState]:
    """Passes that were dropped, with how far they had come."""
    dropped: list[PassState] = []
    drop = Job.drop_youngest

    def spy(self: Job) -> bool:
        dropped.extend(state for _, state in list(self.live.values())[-1:])
        return drop(self)

    monkeypatch.setattr(Job, "drop_youngest", spy)
    return dropped


def under_pressure(d: Any, draw_tokens: Any, seed: int) -> None:
    """Runs what was submitted while requests come at random moments and interrupt the units."""
    source, requests = random.Random(seed), 0
    for _ in range(100_000):
        if d.engine.idle:
            break
        if requests < 40 and source.random() < 0.3:
            requests += 1
            prompt = draw_tokens(requests, source.randint(60, 220))
            params = SamplingParams(source.randint(1, 20), ignore_eos=True)
            d.submit(AddRequest(f"r{requests}", prompt, params, d.clock.now))
        d.step(lambda: source.random() < 0.7)
    assert d.engine.idle
    assert d.failures == []
    assert len(d.tokens()) == requests


@pytest.mark.parametrize("seed", range(4))
def test_dropped_passes_are_replayed_exactly(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any, undisturbed: torch.Tensor, drops: Any, seed: int
) -> None:
    d = driver(jitter_s=0.004, seed=seed, **TIGHT)
    d.submit(start_job(), *training(steps=STEPS))
    under_pressure(d, draw_tokens, seed)
    assert len(drops) > 3
    assert any(state.layer < state.layers for state in drops), "none was dropped in its backward"
    assert torch.equal(d.parameters(), undisturbed)
    assert len(d.of(PassDone)) == sum(isinstance(c, ForwardBackward) for c in training(steps=STEPS))


def test_interleaving_with_requests_leaves_no_trace(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any, undisturbed: torch.Tensor, drops: Any
) -> None:
    d = driver(jitter_s=0.004)
    d.submit(start_job(), *training(steps=STEPS))
    under_pressure(d, draw_tokens, 9)
    assert not drops
    assert torch.equal(d.parameters(), undisturbed)


@pytest.fixture
def gave_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers before which forwards were dropped for a request, which waits for none of them."""
    monkeypatch.setattr(schedule, "WAIT_SHARE", 0.0)
    layers: list[int] = []
    forward = Transformer.forward

    def spy(self: Transformer, batch: Any, cache: Any, goes_on: Callable[[int], bool]) -> torch.Tensor | None:
        def asked(layer: int) -> bool:
            going = goes_on(layer)
            layers.extend([] if going else [layer])
            return going

        return forward(self, batch, cache, asked)

    monkeypatch.setattr(Transformer, "forward", spy)
    return layers


def interrupted_at_random(d: Any, commands: Any, seed: int) -> torch.Tensor:
    """Parameters after `commands`, where it mostly looks as if a request had come."""
    source = random.Random(seed)
    d.submit(*commands)
    d.run(lambda: source.random() < 0.8)
    assert len(d.of(StepDone)) == STEPS
    return d.parameters()  # type: ignore[no-any-return]


def test_a_forward_that_gives_way_leaves_no_trace(
    driver: Any, training: Any, start_job: Any, undisturbed: torch.Tensor, gave_way: list[int]
) -> None:
    d = driver(jitter_s=0.004)
    assert torch.equal(interrupted_at_random(d, (start_job(), *training(steps=STEPS)), 5), undisturbed)
    assert len(gave_way) > 5


def test_a_forward_that_gives_way_and_counts_as_done_breaks_it(
    driver: Any,
    training: Any,
    start_job: Any,
    undisturbed: torch.Tensor,
    gave_way: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = Transformer.forward

    def hasty(self: Transformer, batch: Any, cache: Any, goes_on: Callable[[int], bool]) -> torch.Tensor:
        hidden = forward(self, batch, cache, goes_on)
        return self.weights.embed[batch.tokens] if hidden is None else hidden

    monkeypatch.setattr(Transformer, "forward", hasty)
    d = driver(jitter_s=0.004)
    assert not torch.allclose(
        interrupted_at_random(d, (start_job(), *training(steps=STEPS)), 5), undisturbed, rtol=1e-3, atol=1e-4
    )
    assert len(gave_way) > 5


def test_two_jobs_are_each_as_if_alone(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any, drops: Any
) -> None:
    jobs = {
        "one": (start_job("one", rank=4, seed=1), training("one", seed=1, steps=STEPS)),
        "two": (start_job("two", rank=6, seed=2), training("two", seed=2, steps=STEPS, micros=3)),
    }
    alone = {}
    for name, (start, commands) in jobs.items():
        d = driver()
        d.submit(start, *commands)
        alone[name] = d.run().parameters(name)
    both = driver(jitter_s=0.004, **TIGHT)
    for start, commands in jobs.values():
        both.submit(start, *commands)
    under_pressure(both, draw_tokens, 3)
    assert drops
    for name, expected in alone.items():
        assert torch.equal(both.parameters(name), expected)


def test_gradients_added_before_the_commit_break_it(
    driver: Any,
    training: Any,
    start_job: Any,
    draw_tokens: Any,
    undisturbed: torch.Tensor,
    drops: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, committed = Job._open, Job._commit

    def into_the_steps_buffer(self: Job, command: ForwardBackward) -> bool:
        done = opened(self, command)
        if done:
            _, state = self.live[command.work.id]
            state.grads = self._grad
            state.grad_views = self.layout.views(self._grad)
        return done

    def nothing_left_to_add(self: Job, command: ForwardBackward, state: PassState) -> object:
        state.grads = torch.zeros_like(state.grads)
        return committed(self, command, state)

    monkeypatch.setattr(Job, "_open", into_the_steps_buffer)
    monkeypatch.setattr(Job, "_commit", nothing_left_to_add)
    calm = driver()
    calm.submit(start_job(), *training(steps=STEPS))
    assert torch.allclose(calm.run().parameters(), undisturbed, rtol=1e-3, atol=1e-4), "without drops it is a gradient"
    d = driver(jitter_s=0.004, **TIGHT)
    d.submit(start_job(), *training(steps=STEPS))
    under_pressure(d, draw_tokens, 0)
    assert drops
    assert not torch.allclose(d.parameters(), undisturbed, rtol=1e-3, atol=1e-4)


def test_no_pass_opens_while_a_request_waits(driver: Any, training: Any, start_job: Any, draw_tokens: Any) -> None:
    """Its pages might be the ones that the request needs next."""
    d = driver(max_requests=1)
    for n in range(2):
        d.submit(AddRequest(f"r{n}", draw_tokens(n, 40), SamplingParams(5, ignore_eos=True), d.clock.now))
    d.submit(start_job(), *training(steps=1))
    waited = 0
    while not d.engine.idle:
        d.step()
        if d.engine.requests.waiting:
            waited += 1
            assert d.engine.executor.passes == {}
    assert waited >= 4
    assert len(d.of(StepDone)) == 1
