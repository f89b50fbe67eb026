"""A job that cannot be obeyed fails by name and alone; evaluation changes nothing; repeated commands are ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.config import LINEARS
from coserve_engine.messages import (
    AddRequest,
    ForwardBackward,
    IterationDone,
    JobFailed,
    JobStarted,
    JobStopped,
    LoraSpec,
    OptimStep,
    Pass,
    PassDone,
    PassMode,
    SamplingParams,
    StartJob,
    StepDone,
    StopJob,
    TrainSeq,
)

SPEC = LoraSpec(4, 8.0, LINEARS)


def failure(d: Any) -> JobFailed:
    """The one failure of a job; requests run on and no page is lost."""
    d.submit(AddRequest("r", (5, 6), SamplingParams(2, ignore_eos=True), 0.0))
    failed: JobFailed = d.run().one(JobFailed)
    assert len(d.tokens()["r"]) == 2
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total
    assert d.engine.executor.passes == {}
    return failed


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (LoraSpec(0, 8.0, LINEARS), "rank 0"),
        (LoraSpec(-1, 8.0, LINEARS), "rank -1"),
        (LoraSpec(10**5000, 8.0, LINEARS), "rank above 1e+20"),
        (LoraSpec(4, 8.0, LINEARS, dropout=0.95), "dropout is 0.95"),
        (LoraSpec(65, 8.0, LINEARS), "maxRank 64"),
        (LoraSpec(4, float("inf"), LINEARS), "alpha"),
        (LoraSpec(4, 8.0, ()), "targets"),
        (LoraSpec(4, 8.0, ("q_proj", "lm_head")), "lm_head"),
    ],
    ids=range(8),
)
def test_an_adapter_that_cannot_be_trained(driver: Any, spec: LoraSpec, named: str) -> None:
    d = driver()
    d.submit(StartJob("job", spec, 0))
    failed = failure(d)
    assert failed.code == "invalid_command"
    assert named in failed.message
    assert d.engine.jobs == {}


def test_finetuning_may_be_disabled(driver: Any) -> None:
    d = driver(finetuning=False)
    d.submit(StartJob("job", SPEC, 0))
    failed = failure(d)
    assert failed.code == "invalid_command"
    assert "finetuning is disabled" in failed.message


def test_a_job_that_runs_already_goes_on(driver: Any, training: Any, start_job: Any) -> None:
    d = driver()
    d.submit(start_job(), start_job(), *training(steps=1))
    d.run()
    assert d.one(JobFailed).code == "job_running"
    assert "runs already" in d.one(JobFailed).message
    assert len(d.of(StepDone)) == 1


@pytest.mark.parametrize("command", [OptimStep("job", 1, 1e-3), StopJob("job")], ids=("step", "stop"))
def test_a_job_that_does_not_run(driver: Any, command: Any) -> None:
    d = driver()
    d.submit(command)
    assert "does not run here" in failure(d).message


@pytest.mark.parametrize(
    ("seqs", "named"),
    [
        ((), "no sequence"),
        ((TrainSeq(3, (5,), (1.0,)),), "sample 3 has 1 tokens"),
        ((TrainSeq(3, (5,) * 257, (1.0,) * 257),), "sample 3 has 257 tokens"),
        ((TrainSeq(3, (5, 6), (1.0,)),), "1 weights"),
        ((TrainSeq(3, (5, 128), (1.0, 1.0)),), "vocabulary of 128"),
        ((TrainSeq(3, (5, -1), (1.0, 1.0)),), "vocabulary of 128"),
        ((TrainSeq(3, (5, 6), (1.0, 0.0)),), "no supervised token"),
        (tuple(TrainSeq(n, (5,) * 256, (1.0,) * 256) for n in range(17)), "KV pages"),
    ],
    ids=("none", "short", "long", "weights", "token", "negative", "unsupervised", "pages"),
)
def test_a_pass_that_cannot_run(
    driver: Any, training: Any, start_job: Any, seqs: tuple[TrainSeq, ...], named: str
) -> None:
    d = driver()
    d.submit(start_job(), *training(steps=1))
    d.step(lambda: True)
    d.submit(ForwardBackward("job", 99, Pass(99, "job", 1, 0, seqs)))
    failed = failure(d)
    assert failed.code == "invalid_command"
    assert named in failed.message
    assert d.engine.jobs == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", float("nan")),
        ("lr", -1e-3),
        ("lr", float("inf")),
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("eps", 0.0),
        ("eps", 1e-60),
        ("weight_decay", -0.1),
        ("max_grad_norm", float("nan")),
    ],
)
def test_a_step_that_would_ruin_the_adapter(
    driver: Any, training: Any, start_job: Any, field: str, value: float
) -> None:
    *passes, step = training(steps=1)
    d = driver()
    d.submit(start_job(), *passes, replace(step, **{field: value}))
    failed = failure(d)
    assert failed.code == "invalid_command"
    assert f"{field} is {value}" in failed.message


def test_the_least_epsilon_leaves_finite_parameters(driver: Any, training: Any, start_job: Any) -> None:
    """B's gradient is all there is at first: A's is zero, and divided by it."""
    *passes, step = training(steps=1)
    d = driver()
    d.submit(start_job(), *passes, replace(step, eps=1e-12))
    assert d.run().parameters().isfinite().all()


@pytest.mark.parametrize(
    ("seed", "priority", "named"),
    [
        (2**64, 1.0, "seed"),
        (-1, 1.0, "seed"),
        (10**5000, 1.0, "seed is above 1e+20"),
        (0, 0.0, "priority"),
        (0, 10**5000, "priority is above 1e+20"),
    ],
    ids=("wide", "negative", "digits", "none", "many"),
)
def test_a_start_that_cannot_be(driver: Any, seed: int, priority: float, named: str) -> None:
    d = driver()
    d.submit(StartJob("job", SPEC, seed, priority=priority))
    assert named in failure(d).message


def test_a_loss_that_is_none(driver: Any, training: Any, start_job: Any) -> None:
    first, *_ = training(steps=1)
    d = driver()
    d.submit(start_job(), replace(first, loss="nope"))
    assert "cross_entropy" in failure(d).message


def test_commands_sent_twice_count_once(driver: Any, training: Any, start_job: Any) -> None:
    commands, once, twice = training(steps=3), driver(), driver()
    once.submit(start_job(), *commands)
    twice.submit(start_job(), *commands[:4], *commands[:4], *commands)
    once.run()
    twice.run()
    assert len(twice.of(StepDone)) == 3
    assert torch.equal(once.parameters(), twice.parameters())


def test_evaluation_gives_the_loss_and_changes_nothing(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any
) -> None:
    """Between any two commands of the stream, before and after training."""
    plain_stream = training(steps=3)
    seqs = (TrainSeq(0, draw_tokens(1, 200), (1.0,) * 200), TrainSeq(1, draw_tokens(2, 30), (0.0,) * 10 + (1.0,) * 20))
    stream: list[Any] = []
    for command in plain_stream:
        stream += [ForwardBackward("job", 0, Pass(0, "job", 0, 0, seqs, PassMode.EVAL)), command]
    stream.append(stream[0])
    d, expected = driver(), driver()
    d.submit(start_job(), *(replace(command, seq_no=n) for n, command in enumerate(stream, 1)))
    expected.submit(start_job(), *plain_stream)
    assert torch.equal(d.run().parameters(), expected.run().parameters())
    evals = [done for done in d.of(PassDone) if done.mode is PassMode.EVAL]
    assert len(evals) == len(plain_stream) + 1
    assert all(done.weight_sum == 199 + 20 and done.tokens == 230 for done in evals)
    losses = [done.loss_sum for done in evals]
    assert losses[0] == losses[1] == losses[2] != losses[3], "the model changes with the optimizer step alone"


def test_the_loss_of_evaluation_is_that_of_training(driver: Any, start_job: Any, draw_tokens: Any) -> None:
    d, seqs = driver(), (TrainSeq(0, draw_tokens(1, 200), (0.5,) * 200),)
    for n, mode in enumerate((PassMode.EVAL, PassMode.TRAIN), 1):
        d.submit(*([start_job()] if n == 1 else []), ForwardBackward("job", n, Pass(n, "job", 0, 0, seqs, mode)))
    first, second = d.run().of(PassDone)
    assert first.loss_sum == second.loss_sum


@pytest.mark.parametrize("steps", range(5))
def test_a_stopped_job_leaves_nothing(driver: Any, training: Any, start_job: Any, steps: int) -> None:
    d = driver()
    d.submit(start_job(), *training(steps=3))
    for _ in range(steps):
        d.step(lambda: True)
    d.submit(StopJob("job"))
    stopped = d.run().one(JobStopped)
    assert stopped.checkpoint is None
    assert d.engine.jobs == {}
    assert d.engine.executor.passes == {}
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total
    d.submit(start_job())
    assert len(d.run().of(JobStarted)) == 2


@pytest.mark.parametrize("most", [64, None])
def test_windows_have_a_limit_of_their_own(driver: Any, start_job: Any, draw_tokens: Any, most: int | None) -> None:
    d = driver(max_window_rows=most)
    seqs = (TrainSeq(0, draw_tokens(1, 200), (0.01,) * 200),)
    d.submit(start_job(), ForwardBackward("job", 1, Pass(1, "job", 0, 0, seqs)))
    rows = [done.finetune_tokens for done in d.run().of(IterationDone)]
    assert sum(rows) == 200 and (max(rows) == 64) == (most == 64)
