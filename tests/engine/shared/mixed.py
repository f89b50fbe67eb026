"""A run with everything in it: requests of every kind, with adapters and without, put out and taken in again, beside a
job that trains and evaluates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coserve_engine.config import LINEARS
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Cancel,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    Pass,
    PassDone,
    PassMode,
    SamplingParams,
    StartJob,
    StepDone,
    TrainSeq,
)
from coserve_engine.numerics import Numerics

TIGHT_PAGES = 24
TIGHT: dict[str, Any] = {"kv_cache_bytes": TIGHT_PAGES * 8192, "max_model_length": 256, "numerics": Numerics(page=16)}
"""Pages for a pass and some requests, of `plain` in float32."""
ADAPTERS = (AdapterVersion("a", 1), AdapterVersion("b", 1))
STEPS = 2000


def requests(clock: Callable[[], float]) -> tuple[AddRequest, ...]:
    """Greedy, drawn in each way, with processors, with log-probabilities of choices and prompt, each with an adapter,
    another, and none.
    """
    kinds: tuple[tuple[int, dict[str, Any]], ...] = (
        (20, {"temperature": 0.0}),
        (90, {"seed": 1, "temperature": 1.0}),
        (30, {"seed": 2, "temperature": 1.0, "top_p": 0.9, "min_p": 0.01}),
        (12, {"seed": 3, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.1}),
        (9, {"temperature": 0.0, "logprobs": 2}),
        (70, {"temperature": 0.0, "prompt_logprobs": 1}),
        (8, {"temperature": 0.0, "logit_bias": ((5, 1.0),), "min_tokens": 3}),
    )
    return tuple(
        AddRequest(
            f"{n}-{m}",
            tuple(range(3 + m, 3 + m + length)),
            SamplingParams(max_tokens=12 + 50 * (n % 2), **params, stop_token_ids=(77 + n,), ignore_eos=True),
            clock(),
            adapter,
        )
        for n, (length, params) in enumerate(kinds)
        for m, adapter in enumerate((None, *ADAPTERS))
    )


def run(driver: Any, each: Callable[[], object], every: int = 1) -> None:
    """Run it with every so many-th of the requests; `each` does one step."""
    e = driver.engine.executor
    for rank, version in enumerate(ADAPTERS, 3):
        layout = e.layout(LoraSpec(rank, 8.0, LINEARS[rank:]))
        driver.engine._adapters[version] = e.trained(layout, layout.fresh(rank, e.dtypes.lora, e.device))
    ones = (1.0,) * 100
    seqs = (TrainSeq(0, tuple(range(3, 103)), ones), TrainSeq(1, tuple(range(3, 43)), ones[:40]))
    driver.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS, 0.1), 1, None))
    driver.step()
    driver.submit(
        ForwardBackward("job", 1, Pass(1, "job", 0, 0, seqs, PassMode.TRAIN)),
        OptimStep("job", 2, 1e-3, max_grad_norm=1.0),
        ForwardBackward("job", 3, Pass(2, "job", 0, 0, seqs, PassMode.EVAL), want_logprobs=True),
    )
    for _ in range(3):
        each()
    driver.submit(*requests(driver.clock)[::every])
    for step in range(STEPS):
        if driver.engine.idle:
            break
        if step == 9:
            driver.submit(Cancel("0-0"))
        each()
    assert not driver.failures
    assert len(driver.of(PassDone)) == 2
    assert driver.one(StepDone).step == 1
