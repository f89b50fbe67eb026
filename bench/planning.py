"""What an iteration of a real engine costs beside the model: `Engine.step` without what transformer, head, sampling,
gradients' sums and optimizer take, and without opening and closing passes, which make tensors.

32 requests decode and two jobs train on a narrow model of 12 layers; its width changes nothing of this. Prints the
median microseconds of the parts and of the whole, beside the floor that the whole is held to: 1,000 us (half a percent
of the default time per output token).

With --fake a table of kernels that computes nothing stands for a GPU, and all requests are drawn by top_p: what is left
is what the host does of an iteration beside launching its kernels. It is held to 2,000 us at 64 rows, 4,000 at 256.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import optimizer_step
from random_model import VOCAB, write_random_model

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.host import set_environment, settle
from coserve_engine.kernels import bound
from coserve_engine.kernels.fake.table import FakeKernels
from coserve_engine.messages import (
    AddRequest,
    Event,
    IterationDone,
    LoraSpec,
    RequestFailed,
    SamplingParams,
    StartJob,
    TokenBatch,
)
from coserve_engine.model import executor as executor_module
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState
from coserve_engine.model.transformer import Transformer
from coserve_engine.running import at_once
from coserve_engine.scheduler.iteration import Accounts
from coserve_engine.serving.serving import Serving
from coserve_engine.training import jobs
from coserve_engine.training.job_table import JobTable

FLOOR_US = 1000.0
FAKE_FLOORS_US = {64: 2000.0, 256: 4000.0}
MODEL: tuple[tuple[Any, str], ...] = (
    (Transformer, "forward"),
    (Transformer, "backward"),
    (Executor, "_logits"),
    (Executor, "open_pass"),
    (Executor, "close_pass"),
    (executor_module.head, "head_unit"),
    (Executor, "sample"),
    (jobs.Job, "_commit"),
    (jobs.Job, "_optimize"),
)
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("layout of the forward", executor_module, "lay_out"),
    ("its tensors", bound, "bind"),
    ("jobs", JobTable, "advance"),
    ("room for requests", Serving, "make_room"),
    ("view", Engine, "_view"),
    ("tokens", Serving, "commit"),
    ("units", at_once, "run_units"),
    ("accounts and lesson", Accounts, "close"),
    ("load report", Engine, "_report"),
)


class Stopwatch:
    """Seconds by name, those of the model apart from whatever calls it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.model_s = 0.0
        self._closed: list[PassState] = []
        """Passes that were closed: to free their hundreds of tensors is none of the planning."""

    def kept(self, close: Callable[[Executor, int], None]) -> Callable[[Executor, int], None]:
        """`Executor.close_pass` that leaves the pass's tensors to the end of the iteration."""

        def run(executor: Executor, pass_id: int) -> None:
            self._closed.append(executor.passes[pass_id])
            close(executor, pass_id)

        return run

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its own time counted as `name`, or as the model's."""

        def run(*args: Any, **options: Any) -> Any:
            model_s, started = self.model_s, time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                passed_s = time.perf_counter() - started
                if name == "model":
                    self.model_s = model_s + passed_s
                else:
                    own_s = passed_s - (self.model_s - model_s)
                    self.seconds[name] = self.seconds.get(name, 0.0) + own_s

        return run

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Counts a step anew."""
        self.seconds, self.model_s = {}, 0.0
        self._closed.clear()
        started = time.perf_counter()
        yield
        self.seconds["sum"] = time.perf_counter() - started - self.model_s


def ask(engine: Engine, draw: random.Random, requests: int, **how: float) -> None:
    """Submit `requests` that decode for long, sampled as `how` says."""
    for n in range(requests):
        prompt = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(100, 600)))
        params = SamplingParams(400, seed=n, ignore_eos=True, **how)
        engine.submit(AddRequest(f"r{n}", prompt, params, time.monotonic()))


def fake_engine(path: Path, requests: int) -> Engine:
    """`requests` that decode for long, and a device that computes nothing."""

    def select(config: Any, numerics: Any, dtypes: Any, rope: Any, **how: bool) -> FakeKernels:
        return FakeKernels(config, numerics, dtypes, rope)

    executor_module.select = select
    room = {"max_requests": requests, "max_batch_tokens": 8192, "max_model_length": 1024}
    engine = Engine(EngineConfig(str(path), kv_cache_bytes=requests << 21, **room))
    ask(engine, random.Random(0), requests, temperature=0.7, top_p=0.9)
    return engine


def busy_engine(path: Path, requests: int) -> Engine:
    """`requests` that decode for long, and two jobs with hundreds of passes."""
    draw = random.Random(0)
    engine = Engine(EngineConfig(str(path), kv_cache_bytes=128 << 20))
    engine.ready()
    for job in ("a", "b"):
        engine.submit(StartJob(job, LoraSpec(8, 16.0, LINEARS), 0))
        for step in range(400):
            for command in optimizer_step(job, step, [[[draw.randrange(VOCAB) for _ in range(500)]]]):
                engine.submit(command)
    ask(engine, draw, requests)
    return engine


def over(events: list[Event]) -> bool:
    """Whether a request ended: from then on fewer decode, so no iteration has them all again."""
    tokens = (token for event in events if isinstance(event, TokenBatch) for token in event.tokens)
    return any(isinstance(event, RequestFailed) for event in events) or any(token.finish for token in tokens)


def full_iterations(engine: Engine, watch: Stopwatch, requests: int, wanted: int) -> list[dict[str, float]]:
    """Seconds by name of `wanted` iterations in which all requests decode.

    Raises:
        SystemExit: a request ended before there were so many.
    """
    seen: list[dict[str, float]] = []
    while len(seen) < wanted:
        with watch.iteration():
            events = engine.step()
        if any(isinstance(e, IterationDone) and e.decode_tokens == requests for e in events):
            seen.append(watch.seconds)
        if over(events):
            break
    if len(seen) < wanted:
        raise SystemExit(
            f"--iterations is {wanted}, but only {len(seen)} had all {requests} requests decoding before the first one "
            "ended: leave the machine to this program, or lower --iterations or --requests"
        )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--fake", action="store_true", help="a device that computes nothing, and no jobs")
    options = parser.parse_args()
    set_environment()
    watch = Stopwatch()
    Executor.close_pass = watch.kept(Executor.close_pass)  # type: ignore[method-assign]
    for owner, name in MODEL:
        setattr(owner, name, watch.timed("model", getattr(owner, name)))
    for part, owner, name in PARTS:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder), layers=12, hidden=64, intermediate=64)
        engine = (fake_engine if options.fake else busy_engine)(path, options.requests)
        engine._policy = watch.timed("decide", engine._policy)
        settle()
        seen = full_iterations(engine, watch, options.requests, options.iterations)
    for part in ("decide", *(name for name, _, _ in PARTS)):
        print(f"{part:<24}{1e6 * statistics.median(s.get(part, 0.0) for s in seen):8.0f} us")
    total_us = 1e6 * statistics.median(s["sum"] for s in seen)
    floor_us = FAKE_FLOORS_US.get(options.requests, FLOOR_US) if options.fake else FLOOR_US
    print(f"{'sum, with the rest':<24}{total_us:8.0f} us, floor {floor_us:.0f} us: {total_us / floor_us:.2f} x")


if __name__ == "__main__":
    main()
