"""A request may run on what a job trains just now: a copy, with the bits of the adapter that the job would export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    CopyAdapter,
    ExportAdapter,
    LoadAdapter,
    OptimStep,
    RequestFailed,
    SamplingParams,
    StepDone,
    StopJob,
    TokenBatch,
    UnloadAdapter,
)
from coserve_engine.tensors.lora import LoraWeights

STEPS = 4
FILE = AdapterVersion("file", 1)
PARAMS = SamplingParams(8, ignore_eos=True, logprobs=0)


def copy_of(step: int) -> AdapterVersion:
    return AdapterVersion("job@live", step)


def weights(driver: Any, version: AdapterVersion) -> LoraWeights:
    return driver.engine._adapters[version]  # type: ignore[no-any-return]


def same(a: LoraWeights, b: LoraWeights) -> bool:
    ours, theirs = ([{n: p.parts for n, p in layer.items()} for layer in each.layers] for each in (a, b))
    assert [layer.keys() for layer in ours] == [layer.keys() for layer in theirs]
    return all(
        torch.equal(x, y)
        for one, other in zip(ours, theirs, strict=True)
        for n in one
        for x, y in zip(one[n], other[n], strict=True)
    )


def said(driver: Any, request: str) -> list[Any]:
    tokens = [token for batch in driver.of(TokenBatch) for token in batch.tokens if token.request_id == request]
    assert len(tokens) == PARAMS.max_tokens
    return [(token.token, token.logprobs) for token in tokens]


@pytest.fixture
def trained(driver: Callable[..., Any], training: Any, start_job: Any, tmp_path: Path) -> Any:
    """A driver whose job was copied and exported after each step."""
    d = driver()
    commands, steps = [], 0
    for command in training(steps=STEPS, micros=1):
        commands.append(command)
        if isinstance(command, OptimStep):
            steps += 1
            commands.append(ExportAdapter("job", 0, str(tmp_path / f"s{steps}"), "base"))
    d.submit(start_job())
    for number, command in enumerate(commands, 1):
        d.submit(replace(command, seq_no=number))
        d.run()
        if isinstance(command, ExportAdapter):
            d.submit(CopyAdapter(copy_of(len(d.of(StepDone))), "job"))
    d.run()
    return d


def test_copies_have_the_bits_of_the_exports_and_keep_them(trained: Any, tmp_path: Path, draw_tokens: Any) -> None:
    d, prompt = trained, draw_tokens(2, 30)
    copied = {each.version: each for each in d.of(AdapterLoaded)}
    assert [copied[copy_of(step)].step for step in range(1, STEPS + 1)] == list(range(1, STEPS + 1))
    answers = []
    for step in range(1, STEPS + 1):
        d.submit(LoadAdapter(replace(FILE, number=step), str(tmp_path / f"s{step}")))
        d.run()
        loaded = weights(d, replace(FILE, number=step))
        assert same(weights(d, copy_of(step)), loaded)
        assert copied[copy_of(step)].bytes == loaded.bytes > 0
        for name, version in (("copy", copy_of(step)), ("file", replace(FILE, number=step))):
            d.submit(AddRequest(f"{name}{step}", prompt, PARAMS, 0.0, version))
            d.run()
        answers.append(said(d, f"copy{step}"))
        assert answers[-1] == said(d, f"file{step}")
    assert len(set(map(str, answers))) == STEPS, "each step changes the answer"


def test_a_request_right_behind_the_copy_runs_on_it(
    driver: Callable[..., Any], training: Any, start_job: Any, draw_tokens: Any
) -> None:
    d = driver()
    d.submit(start_job(), *training(steps=1))
    d.run()
    d.submit(CopyAdapter(copy_of(1), "job"), AddRequest("r", draw_tokens(2, 30), PARAMS, 0.0, copy_of(1)))
    d.step()
    d.submit(UnloadAdapter(copy_of(1)))
    assert len(d.run().tokens()["r"]) == PARAMS.max_tokens
    assert copy_of(1) not in d.engine._adapters


def test_of_a_job_that_does_not_run_there_is_no_copy(
    driver: Callable[..., Any], training: Any, start_job: Any, draw_tokens: Any
) -> None:
    d = driver()
    d.submit(CopyAdapter(copy_of(0), "job"), AddRequest("r", draw_tokens(2, 30), PARAMS, 0.0, copy_of(0)))
    assert "job does not run here" in d.run().one(AdapterFailed).message
    assert d.one(RequestFailed).code == "unknown_adapter"
    d.submit(start_job(), *training(steps=1))
    d.run()
    d.submit(CopyAdapter(copy_of(1), "job"), CopyAdapter(copy_of(1), "job"), StopJob("job"))
    assert "unload it first" in d.run().of(AdapterFailed)[-1].message
    d.submit(AddRequest("after", draw_tokens(2, 30), PARAMS, 0.0, copy_of(1)))
    assert len(d.run().tokens()["after"]) == PARAMS.max_tokens, "a copy outlives its job"
