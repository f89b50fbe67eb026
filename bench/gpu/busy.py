"""Iterations in which everything happens that an engine does: where they wait for the device, and what they hold."""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from held import memory, planned, reset_peak
from random_models import draw_adapter, draw_sequence
from runner import Figures
from waits import Waits

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.kernels.fallback import OURS
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    ForwardBackward,
    JobFailed,
    LoadAdapter,
    LoraSpec,
    OptimStep,
    Pass,
    PassMode,
    RequestFailed,
    SamplingParams,
    StartJob,
    TrainSeq,
)

ITERATIONS = 100


def place() -> str:
    """module:line of the engine's innermost frame."""
    frame = sys._getframe(1)
    while frame.f_back is not None and "/coserve_engine/" not in frame.f_code.co_filename:
        frame = frame.f_back
    file = frame.f_code.co_filename.rsplit("/coserve_engine/", 1)[-1]
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Waits for the device in the block, by place: as torch warns of them, on a CPU as their operators show them."""
    seen: Counter[str] = Counter()
    if device.type != "cuda":
        with Waits() as waits:
            yield seen
        seen.update({at: count for (kind, at), count in waits.found.items() if kind == "wait"})
        return
    with noted(seen):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def noted(seen: Counter[str]) -> Iterator[None]:
    """Counts by place torch's warnings of a wait."""

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            seen[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


@contextmanager
def counted_twins(device: torch.device) -> Iterator[Counter[str]]:
    """Words that plain operators say in the block though the device has kernels for them: none on a CPU."""
    seen: Counter[str] = Counter()

    def counted(word: str, said: Callable[..., Any]) -> Callable[..., Any]:
        def say(*arguments: Any, **how: Any) -> Any:
            seen[word] += 1
            return said(*arguments, **how)

        return say

    with ExitStack() as stack:
        for word in OURS if device.type == "cuda" else ():
            stack.enter_context(mock.patch.object(TorchKernels, word, counted(word, getattr(TorchKernels, word))))
        yield seen


def _params(n: int, source: random.Random) -> SamplingParams:
    return SamplingParams(
        source.randint(4, 20),
        temperature=0.7 * (n % 2),
        top_p=0.9 if n % 4 == 1 else 1.0,
        top_k=20 if n % 4 == 3 else 0,
        seed=n,
        logprobs=2 if n % 3 == 0 else None,
        prompt_logprobs=1 if n % 7 == 0 else None,
        repetition_penalty=1.1 if n % 5 == 0 else 1.0,
        frequency_penalty=0.2 if n % 5 == 1 else 0.0,
        logit_bias=((7, 2.0),) if n % 5 == 2 else (),
        min_tokens=2 * (n % 2),
        stop_token_ids=(11,),
    )


def _job(seed: int) -> Iterator[ForwardBackward | OptimStep]:
    """Steps of two passes, each followed by an evaluation."""
    number = 0
    for step in range(ITERATIONS):
        for micro, mode in enumerate((PassMode.TRAIN, PassMode.TRAIN, PassMode.EVAL)):
            number += 1
            if mode is PassMode.EVAL:
                yield OptimStep("job", number, 1e-3)
                number += 1
            seqs = tuple(TrainSeq(n, draw_sequence(seed + number + n, 40), (0.01,) * 40) for n in range(2))
            yield ForwardBackward("job", number, Pass(0, "job", step, micro, seqs, mode))


def busy_engine(config: EngineConfig, adapters: Path) -> Iterator[Engine]:
    """An engine before each of ITERATIONS."""
    engine = Engine(config)
    versions = [AdapterVersion(name, 1) for name in "ab"]
    for n, version in enumerate(versions):
        drawn = draw_adapter(engine.executor, rank=(4, 6)[n], seed=n)
        write_folder(adapters / version.uid, *peft_files(drawn.layout, drawn.flat.cpu(), "base"))
        engine.submit(LoadAdapter(version, str(adapters / version.uid)))
    engine.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS, 0.1), 1))
    for command in _job(100):
        engine.submit(command)
    while not engine.jobs or len(engine._adapters) < len(versions):
        engine.step()
        time.sleep(0.001)
    source = random.Random(2)
    for n in range(ITERATIONS):
        if source.random() < 0.4:
            version, prompt = (None, *versions)[n % 3], draw_sequence(n, source.randint(10, 200))
            engine.submit(AddRequest(f"r{n}", prompt, _params(n, source), time.monotonic(), version))
        yield engine


def waits(folder: Path, adapters: Path, device: torch.device) -> Figures:
    """ITERATIONS mixed ones, with too few pages: waits for the device by place, words that are computed without their
    kernels, and memory. None may wait, and nothing be left to plain operators.
    """
    settings: dict[str, Any] = {"max_model_length": 256, "device": str(device), "dtype": "bfloat16"}
    config = EngineConfig(str(folder), kv_cache_bytes=14 * 64 * 256, **settings)
    plan = planned(config, device)
    reset_peak(device)
    total: Counter[str] = Counter()
    failures: list[str] = []
    kinds: Counter[str] = Counter()
    twins: Counter[str] = Counter()
    for engine in busy_engine(config, adapters):
        with counted_waits(device) as seen, counted_twins(device) as plain:
            events = engine.step()
        total += seen
        twins += plain
        kinds.update(type(event).__name__ for event in events)
        failures += [event.message for event in events if isinstance(event, RequestFailed | JobFailed)]
    found = memory(engine, device, plan)
    lines = [f"- {sum(total.values()) / ITERATIONS:.1f} waits an iteration, {ITERATIONS} iterations", *found["lines"]]
    lines += [f"- {count / ITERATIONS:6.2f} an iteration: {where}" for where, count in total.most_common()]
    lines += [f"- {count} times by plain operators: {word}" for word, count in twins.most_common()]
    lines += [f"- failed: {message}" for message in failures]
    met = found["met"] and not failures and not total and not twins
    counts = {"waits": dict(total), "twins": dict(twins), "events": dict(kinds)}
    return {**counts, "bytes": found["bytes"], "lines": lines, "met": met}
