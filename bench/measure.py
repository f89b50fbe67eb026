"""What several benchmarks measure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from coserve_engine.engine import Engine
from coserve_engine.messages import AddRequest, ForwardBackward, OptimStep, Pass, TrainSeq


def machine_speed() -> tuple[float, float]:
    """Bytes a second of reading memory, operations a second of a GEMM."""
    numbers = torch.ones(32 << 20)  # untouched memory would be one page of zeros, read from a cache
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    torch.mm(a, b), numbers.sum()
    started = time.perf_counter()
    for _ in range(3):
        numbers.sum()
    bandwidth = 3 * numbers.nbytes / (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(20):
        torch.mm(a, b)
    return bandwidth, 20 * 2 * 512**3 / (time.perf_counter() - started)


def optimizer_step(
    job: str, step: int, passes: Sequence[Sequence[Sequence[int]]]
) -> Iterator[ForwardBackward | OptimStep]:
    """The commands of a job's `step`, from 0: the samples of each of its passes, whose tokens all count alike. Every
    step has as many passes, by which the commands are numbered.
    """
    weight = 1.0 / sum(len(tokens) - 1 for samples in passes for tokens in samples)
    number = step * (len(passes) + 1) + 1
    for micro, samples in enumerate(passes):
        seqs = tuple(TrainSeq(i, tuple(tokens), (weight,) * len(tokens)) for i, tokens in enumerate(samples))
        yield ForwardBackward(job, number + micro, Pass(0, job, step, micro, seqs))
    yield OptimStep(job, number + len(passes), 1e-3)


def answer_s(engine: Engine, work: Iterable[AddRequest]) -> float:
    """Seconds until the engine has answered all of `work`."""
    started = time.perf_counter()
    for request in work:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    return time.perf_counter() - started
