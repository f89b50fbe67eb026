"""Values that are not finite stay where they arose: a step is skipped, a request fails, and pages come back clean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Cancel,
    ForwardBackward,
    LossName,
    OptimStep,
    Pass,
    RequestFailed,
    SamplingParams,
    StepDone,
    StopJob,
    TrainSeq,
)
from coserve_engine.model import executor, losses
from coserve_engine.model.losses import LOSSES
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.kv_cache import KVCache

GREEDY = SamplingParams(8, ignore_eos=True)
ONE_AT_A_TIME = {"kv_cache_bytes": 6 * 32768}
"""5 pages: whoever comes next gets pages of the one before."""


@pytest.mark.parametrize("weight", (float("nan"), float("inf")))
def test_a_step_without_a_finite_gradient_is_skipped(driver: Any, training: Any, start_job: Any, weight: float) -> None:
    """What follows is as if the step had never been."""
    good = training(steps=3)
    expected = driver()
    expected.submit(start_job(), *good)
    expected.run()
    bad = [
        ForwardBackward("job", 0, Pass(0, "job", 0, 0, (TrainSeq(0, (5, 6, 7, 8), (0.1, 0.1, weight, 0.1)),))),
        OptimStep("job", 0, 1e-2),
    ]
    stream = [replace(c, seq_no=n) for n, c in enumerate([*good[:3], *bad, *good[3:]], 1)]
    d = driver()
    d.submit(start_job(), *stream)
    d.run()
    assert [step.skipped for step in d.of(StepDone)] == [False, True, False, False]
    assert torch.equal(d.parameters(), expected.parameters())
    assert d.failures == []


def test_a_skipped_step_changes_nothing(driver: Any, start_job: Any) -> None:
    d = driver()
    d.submit(start_job())
    d.run()
    before = d.parameters()
    work = Pass(0, "job", 0, 0, (TrainSeq(0, (5, 6, 7), (0.0, float("nan"), 1.0)),))
    d.submit(ForwardBackward("job", 1, work), OptimStep("job", 2, 1e-2, weight_decay=0.1))
    done = d.run().one(StepDone)
    assert done.skipped
    assert torch.equal(d.parameters(), before)


@pytest.mark.parametrize("kind", ("loss", "gradient"))
def test_such_a_step_touches_nothing_else(
    driver: Any,
    training: Any,
    start_job: Any,
    draw_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A loss may be NaN where its gradient is finite, and a gradient infinite where the loss is finite."""
    d, alone = driver(), driver()
    other = [start_job("other", rank=6, seed=2), *training("other", seed=2, steps=2)]
    alone.submit(*other)
    expected = alone.run().parameters("other")
    d.submit(start_job(), *training(steps=2))
    d.run()
    job = d.engine.jobs["job"]
    before = job._state.copy()

    def broken(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, slope = LOSSES[LossName.CROSS_ENTROPY].coefficient(*args)
        return (loss * float("nan"), slope) if kind == "loss" else (loss, slope * float("inf"))

    monkeypatch.setattr(
        losses,
        "LOSSES",
        {**LOSSES, LossName.IMPORTANCE_SAMPLING: replace(LOSSES[LossName.CROSS_ENTROPY], coefficient=broken)},
    )
    monkeypatch.setattr(executor, "LOSSES", losses.LOSSES)
    work = Pass(0, "job", 0, 0, (TrainSeq(0, draw_tokens(1, 30), (0.1,) * 30, 0, (0.0,) * 30, (1.0,) * 30),))
    bad = ForwardBackward("job", 90, work, LossName.IMPORTANCE_SAMPLING)
    d.submit(*other, bad, OptimStep("job", 91, 1e-2, weight_decay=0.1))
    d.submit(AddRequest("r", draw_tokens(4, 70), GREEDY, 0.0))
    d.run()
    assert [step.skipped for step in d.of(StepDone) if step.job == "job"] == [False, False, True]
    after = job._state
    assert torch.equal(after.param, before.param)
    assert torch.equal(after.adam.m, before.adam.m)
    assert torch.equal(after.adam.v, before.adam.v)
    assert after.adam.updates == before.adam.updates
    assert torch.equal(d.parameters("other"), expected)
    alone.submit(AddRequest("r", draw_tokens(4, 70), GREEDY, 0.0))
    assert d.tokens() == alone.run().tokens()
    assert d.failures == []


# ---- pages ----


def poisoned(executor: Any, random_adapter: Any) -> Any:
    """An adapter with finite weights whose products overflow."""
    adapter = random_adapter(executor)
    adapter.flat.mul_(1e25)
    assert torch.isfinite(adapter.flat).all()
    return adapter


def tokens_after(d: Any, prompt: tuple[int, ...]) -> list[int]:
    """Of a base request on pages that were used before."""
    d.submit(AddRequest("after", prompt, GREEDY, d.clock.now))
    return list(d.run().tokens()["after"])


@pytest.fixture
def clean_tokens(driver: Any, draw_tokens: Any) -> list[int]:
    return tokens_after(driver(), draw_tokens(4, 70))


@pytest.fixture
def no_scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "scrub", lambda self, pages: None)


def diverged_job(d: Any, start_job: Any, draw_tokens: Any) -> None:
    """A pass with an adapter that overflows; the pass's pages are all there are."""
    d.submit(start_job())
    d.run()
    job = d.engine.jobs["job"]
    job._state.param.mul_(1e30).add_(1e30)
    job.weights.renew()
    seqs = (TrainSeq(0, draw_tokens(1, 250), (0.01,) * 250),)
    d.submit(ForwardBackward("job", 1, Pass(0, "job", 0, 0, seqs)), OptimStep("job", 2, 1e-3))
    assert d.run().one(StepDone).skipped
    d.submit(StopJob("job"))
    d.run()


def test_pages_of_a_diverged_pass_come_back_clean(
    driver: Any, start_job: Any, draw_tokens: Any, clean_tokens: list[int]
) -> None:
    d = driver(**ONE_AT_A_TIME)
    diverged_job(d, start_job, draw_tokens)
    assert torch.isfinite(d.engine.executor.cache.v).all()
    assert tokens_after(d, draw_tokens(4, 70)) == clean_tokens


@pytest.mark.usefixtures("no_scrub")
def test_without_scrubbing_they_poison_the_next_request(
    driver: Any, start_job: Any, draw_tokens: Any, clean_tokens: list[int]
) -> None:
    d = driver(**ONE_AT_A_TIME)
    diverged_job(d, start_job, draw_tokens)
    d.submit(AddRequest("after", draw_tokens(4, 70), GREEDY, d.clock.now))
    d.run()
    assert d.tokens().get("after") != clean_tokens


def serve_poison(d: Any, random_adapter: Any, draw_tokens: Any) -> None:
    version = AdapterVersion("poison", 1)
    d.engine._adapters[version] = poisoned(d.engine.executor, random_adapter).weights
    d.submit(AddRequest("poisoned", draw_tokens(2, 200), GREEDY, d.clock.now, version))


def test_a_request_whose_adapter_overflows_fails_alone(
    driver: Any, random_adapter: Any, draw_tokens: Any, clean_tokens: list[int]
) -> None:
    d = driver()
    serve_poison(d, random_adapter, draw_tokens)
    assert tokens_after(d, draw_tokens(4, 70)) == clean_tokens
    failed = d.one(RequestFailed)
    assert (failed.request_id, failed.code) == ("poisoned", "internal_error")
    assert "not finite" in failed.message
    assert "poisoned" not in d.tokens()


@pytest.mark.parametrize("cancelled", (False, True))
def test_pages_of_such_a_request_are_given_out_clean(
    driver: Any, random_adapter: Any, draw_tokens: Any, clean_tokens: list[int], cancelled: bool
) -> None:
    d = driver(**ONE_AT_A_TIME, max_batch_tokens=96)
    serve_poison(d, random_adapter, draw_tokens)
    if cancelled:
        d.step()
        d.submit(Cancel("poisoned"))
    d.run()
    assert not torch.isfinite(d.engine.executor.cache.v).all()
    assert tokens_after(d, draw_tokens(4, 70)) == clean_tokens


def test_a_poisoned_page_reaches_a_masked_tail(rig: Any, draw_tokens: Any) -> None:
    """Why pages are scrubbed: a key after a row's position is masked, but 0 * NaN is NaN."""
    r = rig()
    slot = r.add(draw_tokens(1, 60))
    r.executor.cache.v[:, :, r.sequences[slot].pages[-1] * 64 + 62] = float("nan")
    logits = r.forward(Segment(Kind.PREFILL, slot, 0, 10, sample=True))[slot]
    assert torch.isnan(logits).all()
