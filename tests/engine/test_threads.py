"""With two torch threads, or in float64, what an engine says depends on nobody else either: the sums of few rows are
not split, as MKL would on Intel's processors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine_driver import gather

from coserve_engine.config import EngineConfig
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.host import EngineHost, on_intel
from coserve_engine.messages import (
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    EngineReady,
    Event,
    LoadAdapter,
    SamplingParams,
    StepDone,
    Token,
    TokenBatch,
)

VERSION = AdapterVersion("a", 1)
PARAMS = SamplingParams(12, ignore_eos=True, logprobs=3)
INTEL = on_intel()


@pytest.fixture(scope="module")
def model(model_path: Callable[[str], str]) -> str:
    return model_path("smol")


@pytest.fixture(scope="module")
def adapter(rig: Any, model: str, random_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = random_adapter(rig(model, kv_cache_bytes=64 << 20).executor)
    folder = tmp_path_factory.mktemp("adapters") / "a"
    write_folder(folder, *peft_files(made.layout, made.flat, "base"))
    return str(folder)


@contextmanager
def started(model: str, adapter: str, **settings: Any) -> Iterator[tuple[EngineHost, EngineReady]]:
    host = EngineHost.start(EngineConfig(model, max_model_length=512, kv_cache_bytes=64 << 20, **settings))
    try:
        (ready,) = gather(host, bool)
        assert isinstance(ready, EngineReady)
        host.submit(LoadAdapter(VERSION, adapter))
        gather(host, lambda events: any(isinstance(event, AdapterLoaded) for event in events))
        yield host, ready
    finally:
        host.close()


def said(host: EngineHost, request: str, prompts: list[tuple[int, ...]], *, jobs: int = 0) -> list[Any]:
    """Tokens of the first of these prompts and their log-probabilities, and the norms of `jobs` finished steps."""
    for n, prompt in enumerate(prompts):
        host.submit(AddRequest(f"{request}{n}", prompt, PARAMS, time.monotonic(), VERSION))

    def tokens(events: list[Event]) -> list[Token]:
        return [token for event in events if isinstance(event, TokenBatch) for token in event.tokens]

    def enough(events: list[Event]) -> bool:
        finished = sum(token.finish is not None for token in tokens(events))
        return finished == len(prompts) and sum(isinstance(event, StepDone) for event in events) == jobs

    events = gather(host, enough)
    steps = [event.grad_norm for event in events if isinstance(event, StepDone)]
    return [*((t.token, t.logprobs) for t in tokens(events) if t.request_id == f"{request}0"), *steps]


def alone_and_in_company(
    host: EngineHost, draw_tokens: Any, training: Any, start_job: Any, again: int = 0
) -> tuple[list[Any], list[Any]]:
    prompt = draw_tokens(1, 70)
    others = [draw_tokens(n, 20 + 30 * n) for n in range(2, 6)]
    alone = said(host, f"alone{again}", [prompt])
    for command in (start_job(f"one{again}"), *training(f"one{again}", steps=1)):
        host.submit(command)
    quiet = said(host, "quiet", [], jobs=1)
    for command in (start_job(f"two{again}"), *training(f"two{again}", steps=1)):
        host.submit(command)
    busy = said(host, f"busy{again}", [prompt, *others], jobs=1)
    return alone + quiet, busy


@pytest.mark.parametrize("settings", [{"threads": 2}, {"dtype": "float64"}], ids=("threads", "float64"))
def test_rows_depend_on_nobody_else(
    model: str, adapter: str, draw_tokens: Any, training: Any, start_job: Any, settings: dict[str, Any]
) -> None:
    """Log-probabilities of a request alone and beside others and a job; gradients of a job alone and beside these. On
    other processors than Intel's the log may say that it is not so.
    """
    with started(model, adapter, **settings) as (host, ready):
        exact = not any("not bit-exact" in note for note in ready.notes)
        alone, busy = alone_and_in_company(host, draw_tokens, training, start_job)
    if not exact and not INTEL:
        pytest.skip("the log says that rows depend on their batch here")
    assert exact
    assert len(alone) == PARAMS.max_tokens + 1
    assert alone == busy


@pytest.mark.skipif(not INTEL, reason="MKL's strict mode is for Intel's processors")
def test_without_the_strict_mode_they_do(
    model: str, adapter: str, draw_tokens: Any, training: Any, start_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "MKL_CBWR", "AUTO")
    with started(model, adapter, threads=2) as (host, ready):
        assert any("not bit-exact" in note for note in ready.notes)
        pairs = [alone_and_in_company(host, draw_tokens, training, start_job, again) for again in range(5)]
    assert any(alone != busy for alone, busy in pairs)
