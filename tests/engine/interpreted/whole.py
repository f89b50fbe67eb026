"""A whole engine with requests of several kinds, two adapters and a job, behind a device that is late."""

from __future__ import annotations

from typing import Any

import torch
from engine_driver import Driver

from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    Pass,
    SamplingParams,
    StartJob,
    StepDone,
    TrainSeq,
)
from coserve_engine.numerics import Numerics

A, B = AdapterVersion("a", 1), AdapterVersion("b", 1)
SETTINGS: dict[str, Any] = {
    "max_model_length": 128,
    "kv_cache_bytes": 40 * 8192,
    "max_requests": 4,
    "threads": 1,
    "max_batch_tokens": 64,
    "numerics": Numerics(page=16),
}


def served(d: Driver, random_adapter: Any, draw_tokens: Any) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Tokens of requests of several kinds, and what a job learnt beside them."""
    d.engine._adapters[A] = random_adapter(d.engine.executor).weights
    d.engine._adapters[B] = random_adapter(d.engine.executor, 12, 1, ("q_proj", "v_proj", "down_proj")).weights
    d.submit(StartJob("job", LoraSpec(4, 8.0, ("q_proj", "o_proj", "up_proj", "down_proj"), 0.1), 1))
    d.step()
    seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.05,) * size) for n, size in enumerate((70, 9)))
    d.submit(ForwardBackward("job", 1, Pass(1, "job", 0, 0, seqs)), OptimStep("job", 2, 1e-2))
    kinds: tuple[tuple[int, AdapterVersion | None, dict[str, Any]], ...] = (
        (20, None, {}),
        (5, A, {"temperature": 1.0, "seed": 1}),
        (70, B, {"temperature": 1.0, "top_p": 0.8, "top_k": 20, "seed": 2}),
        (33, None, {"repetition_penalty": 1.2, "logprobs": 2}),
    )
    for n, (length, version, how) in enumerate(kinds):
        params = SamplingParams(6, ignore_eos=True, **how)
        d.submit(AddRequest(f"r{n}", draw_tokens(10 + n, length), params, d.clock.now, version))
    d.run()
    d.submit(AddRequest("last", draw_tokens(3, 4), SamplingParams(8, ignore_eos=True), d.clock.now))
    d.run()
    assert d.failures == []
    assert not d.one(StepDone).skipped
    return d.tokens(), d.parameters()
