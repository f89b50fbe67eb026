"""The whole engine on plain operators says in float32 what it says on the CPU's table, and trains in bfloat16."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from tables import use_torch

from coserve_engine.config import LINEARS
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.kernels.torch import table
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    ForwardBackward,
    LoadAdapter,
    LoraSpec,
    Pass,
    PassDone,
    PassMode,
    SamplingParams,
    SaveCheckpoint,
    StartJob,
    StepDone,
    TrainSeq,
)
from coserve_engine.numerics import Numerics
from coserve_engine.serving.requests import RequestTable
from coserve_engine.training.jobs import Job

TIGHT = {"kv_cache_bytes": 45 * 8192, "max_model_length": 256, "numerics": Numerics(page=16)}
"""44 pages of 16 tokens."""


class Run(NamedTuple):
    """What came of a run."""

    tokens: dict[str, list[int]]
    losses: list[float]
    parameters: torch.Tensor
    dropped: int
    preempted: int


@pytest.fixture
def busy(
    driver: Callable[..., Any],
    draw_tokens: Any,
    training: Any,
    random_adapter: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Run]:
    """An engine with too few pages for what it is given: requests, some with adapters, and a job with an evaluation
    and dropout.
    """

    def run(model: str | None = None, **settings: Any) -> Run:
        counts = {"dropped": 0, "preempted": 0}
        with monkeypatch.context() as patch:

            def counted(owner: type, name: str, what: str) -> None:
                real = getattr(owner, name)

                def spy(self: Any) -> Any:
                    done = real(self)
                    counts[what] += done is not False
                    return done

                patch.setattr(owner, name, spy)

            counted(Job, "drop_youngest", "dropped")
            counted(RequestTable, "preempt_youngest", "preempted")
            d = driver(model, jitter_s=0.004, **{**TIGHT, **settings})
            versions = [AdapterVersion(name, 1) for name in "ab"]
            for n, version in enumerate(versions):
                adapter = random_adapter(d.engine.executor, rank=(4, 6)[n], seed=n)
                folder = tmp_path / f"{id(d)}-{version.uid}"
                write_folder(folder, *peft_files(adapter.layout, adapter.flat, "base"))
                d.submit(LoadAdapter(version, str(folder)))
            d.run()
            d.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS, 0.1), 1), *training(steps=4))
            seqs = tuple(TrainSeq(n, draw_tokens(n, 50), (0.01,) * 50) for n in range(2))
            d.submit(ForwardBackward("job", 100, Pass(100, "job", 4, 0, seqs, PassMode.EVAL)))
            source, sent = random.Random(2), 0
            while not d.engine.idle:
                if sent < 30 and source.random() < 0.3:
                    version = (None, versions[0], None, versions[1])[sent % 4]
                    tokens = draw_tokens(sent, source.randint(60, 220))
                    temperature = 0.7 * (sent % 2)
                    params = SamplingParams(source.randint(1, 20), temperature, seed=sent, ignore_eos=True, logprobs=2)
                    d.submit(AddRequest(f"r{sent}", tokens, params, d.clock.now, version))
                    sent += 1
                d.step(lambda: source.random() < 0.7)
            for n in range(sent, sent + 12):
                version = (None, versions[0], None, versions[1])[n % 4]
                params = SamplingParams(30, 0.7 * (n % 2), seed=n, ignore_eos=True)
                d.submit(AddRequest(f"r{n}", draw_tokens(n, source.randint(3, 200)), params, d.clock.now, version))
            d.run()
            assert d.failures == []
            assert len(d.of(StepDone)) == 4 and not any(step.skipped for step in d.of(StepDone))
            return Run(d.tokens(), [done.loss_sum for done in d.of(PassDone)], d.parameters(), **counts)

    return run


@pytest.mark.parametrize("model", ("plain", "mistral", "qwen3"))
def test_it_says_what_the_cpus_table_says(
    busy: Callable[..., Run], model_path: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kv_cache_bytes": 45 * 8192 * (2 if model == "qwen3" else 1)}
    expected = busy(model_path(model), **settings)
    use_torch(monkeypatch)
    found = busy(model_path(model), **settings)
    assert expected.dropped and found.dropped and expected.preempted and found.preempted
    assert found.tokens == expected.tokens
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert torch.allclose(found.parameters, expected.parameters, rtol=1e-2, atol=1e-3)


def test_a_key_too_many_shows(busy: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    expected = busy()
    use_torch(monkeypatch)
    hidden = table.hidden_keys
    monkeypatch.setattr(table, "hidden_keys", lambda positions, keys, window: hidden(positions + 1, keys, window))
    assert busy().tokens != expected.tokens


def test_it_serves_and_trains_in_bfloat16(busy: Callable[..., Run]) -> None:
    """As many tokens of each request, and losses that are float32's to a hundredth."""
    expected, found = busy(), busy(dtype="bfloat16", kv_cache_bytes=45 * 4096)
    assert found.dropped and found.preempted
    lengths = ({name: len(said) for name, said in run.tokens.items()} for run in (expected, found))
    assert next(lengths) == next(lengths)
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


def test_a_job_in_bfloat16_keeps_its_state_wide(driver: Any, training: Any, start_job: Any, tmp_path: Any) -> None:
    """Parameters, moments and losses stay float32 and are near those of float32; a checkpoint gives them back."""
    wide, d = driver(), driver(dtype="bfloat16")
    commands = training(steps=6, lr=2e-3)
    wide.submit(start_job(), *commands)
    wide.run()
    d.submit(start_job(), *commands, SaveCheckpoint("job", 100, str(tmp_path / "checkpoint"), {}))
    d.run()
    job = d.engine.jobs["job"]
    state = job._state
    assert {x.dtype for x in (state.param, state.adam.m, state.adam.v, job._grad)} == {torch.float32}
    assert {x.dtype for layer in job.weights.layers for pair in layer.values() for x in pair[:4]} == {torch.bfloat16}
    assert not torch.equal(state.param, state.param.bfloat16().float()), "updates would be lost"
    losses, expected = ([done.loss_sum for done in run.of(PassDone)] for run in (d, wide))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)
    resumed = driver(dtype="bfloat16")
    resumed.submit(replace(start_job(), resume=str(tmp_path / "checkpoint")))
    resumed.run()
    again = resumed.engine.jobs["job"]
    assert torch.equal(again._state.param, state.param)
    assert torch.equal(again._state.adam.m, state.adam.m)
    assert all(
        torch.equal(a, b)
        for mine, yours in zip(again.weights.layers, job.weights.layers, strict=True)
        for name in mine
        for a, b in zip(mine[name][:4], yours[name][:4], strict=True)
    )
