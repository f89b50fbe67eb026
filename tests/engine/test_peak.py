"""What an iteration needs beside what outlives it is no more than planned: the table of plain operators, as on a GPU,
with each of its tensors counted as it comes and goes. What a GPU's own kernels take is not seen here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.kernels.torch import attention
from coserve_engine.memory import iteration_bytes
from coserve_engine.messages import (
    AddRequest,
    ForwardBackward,
    JobFailed,
    LoraSpec,
    OptimStep,
    Pass,
    RequestFailed,
    SamplingParams,
    StartJob,
    TrainSeq,
)
from coserve_engine.model.executor import Executor

pytestmark = pytest.mark.filterwarnings("ignore")  # the profiler's own
LENGTH = 512
ALL = {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "logprobs": 5, "repetition_penalty": 1.1, "seed": 1}


def peak(run: Callable[[], object]) -> int:
    """Bytes that were alive at once in `run` beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By name, the most that a forward, a choice of tokens and a unit of backward had alive."""
    found: dict[str, int] = {}
    for name in ("forward", "sample", "backward"):
        plain = getattr(Executor, name)

        def watched(*args: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            out: list[Any] = []
            found[name] = max(found.get(name, 0), peak(lambda: out.append(plain(*args, **options))))
            return out[0]

        monkeypatch.setattr(Executor, name, watched)
    return found


SHAPES = {
    "vocabulary": {"vocab_size": 16384},
    "hidden": {"hidden_size": 512},
    "intermediate": {"intermediate_size": 2048},
    "heads": {"num_attention_heads": 16, "num_key_value_heads": 16},
}
"""In each of them something else decides."""


@pytest.mark.parametrize("shape", SHAPES)
def test_an_iteration_needs_no_more_than_planned(
    shape: str, save_model: Any, peaks: dict[str, int], tmp_path: Path
) -> None:
    """Rows of a full batch, decode beside a long request, every way to choose, and a job's pass in one unit a layer."""
    fields = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": LENGTH}
    save_model(tmp_path, 0, **{**fields, **SHAPES[shape]})
    sizes = {"max_model_length": LENGTH, "max_batch_tokens": LENGTH, "max_requests": 16, "kv_cache_bytes": 128 << 20}
    config = EngineConfig(str(tmp_path), dtype="bfloat16", **sizes)
    engine = Engine(config)
    vocab = engine.executor.model.vocab_size
    engine.submit(StartJob("job", LoraSpec(16, 32.0, LINEARS, 0.1), 0))
    for step in range(2):
        sample = TrainSeq(0, draw(step, LENGTH, vocab), (0.001,) * LENGTH)
        engine.submit(ForwardBackward("job", 2 * step + 1, Pass(0, "job", step, 0, (sample,))))
        engine.submit(OptimStep("job", 2 * step + 2, 1e-3))
    finish(engine)
    for number in range(16):  # keys of all rows are as many as those of the longest
        params, length = SamplingParams(40, ignore_eos=True, **ALL), 8 if number else LENGTH - 40
        engine.submit(AddRequest(f"r{number}", draw(number, length, vocab), params, time.monotonic()))
    finish(engine)
    planned = iteration_bytes(engine.executor.model, config)
    most = max(peaks.values())
    assert most <= planned <= 4 * most, peaks


def finish(engine: Engine) -> None:
    while not engine.idle:
        events = engine.step()
        assert not [event for event in events if isinstance(event, RequestFailed | JobFailed)]
        if not events:
            time.sleep(0.001)  # the thread that makes the adapter wants the interpreter


def draw(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(vocab) for _ in range(length))


def test_decode_rows_are_taken_in_parts(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of all of them side by side could be more than the whole cache: each is padded to the longest."""
    said, parts = [], []
    attend_rows = attention.attend_rows

    def watched(q: torch.Tensor, *args: Any) -> torch.Tensor:
        parts.append(len(q))
        return attend_rows(q, *args)

    monkeypatch.setattr(attention, "attend_rows", watched)
    for most in (attention.GATHERED_BYTES, 3 * 128 * 2 * 16 * 4):
        monkeypatch.setattr(attention, "GATHERED_BYTES", most)
        d = driver(dtype="bfloat16")
        for number in range(8):
            d.submit(AddRequest(f"r{number}", draw(number, 60 + number, 128), SamplingParams(8, ignore_eos=True), 0.0))
        said.append(d.run().tokens())
        assert most > 1 << 20 or max(parts) == 3
    assert said[0] == said[1]
