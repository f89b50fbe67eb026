"""How fast a large model is finetuned, decoded, and both at once, on random weights, beside floors."""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import floors
import machine
import torch
from held import memory, planned, reset_peak
from machine import Rates
from measure import optimizer_step
from models import drawn_weights, write_config
from runner import Figures
from words import Words

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.memory import MemoryPlan
from coserve_engine.messages import (
    AddRequest,
    Cancel,
    Event,
    IterationDone,
    JobFailed,
    LoraSpec,
    RequestFailed,
    SamplingParams,
    StartJob,
    StepDone,
    StopJob,
    TokenBatch,
)

RANK = 16
ROWS, LOADS = (1, 16, 64), (30, 70)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is run.

    Args:
        fields: the model's config.json.
        step_s: a step of finetuning may take so long; the model gets fewer layers where it would take longer.
        sample: tokens of a sample, of which a step has two, a pass each.
        context: tokens of a prompt that is decoded from; `output`: tokens of an answer where both are at work.
    """

    fields: dict[str, Any]
    step_s: float
    sample: int
    context: int
    output: int
    max_model_length: int
    max_batch_tokens: int
    max_requests: int
    kv_cache_bytes: int


class FailedError(Exception):
    """The engine refused or gave up what it was to be timed with."""


class Job:
    """A job on an engine; a call is one more optimizer step, of two passes, and returns its seconds."""

    def __init__(self, engine: Engine, job: str, sizes: Sizes, device: torch.device) -> None:
        self.job, self.submitted = job, 0
        self._engine, self._sizes, self._device = engine, sizes, device
        engine.submit(StartJob(job, LoraSpec(RANK, 2.0 * RANK, LINEARS), 0))
        while job not in engine.jobs:
            _checked(engine.step())
            time.sleep(0.001)  # the thread that makes the adapter wants the interpreter

    def submit(self) -> None:
        source, s = random.Random(self.submitted), self._sizes
        passes = [[[source.randrange(s.fields["vocab_size"]) for _ in range(s.sample)]] for _ in range(2)]
        for command in optimizer_step(self.job, self.submitted, passes):
            self._engine.submit(command)
        self.submitted += 1

    def __call__(self) -> float:
        self.submit()
        machine.wait(self._device)
        started = time.perf_counter()
        _drain(self._engine)
        machine.wait(self._device)
        return time.perf_counter() - started


@dataclass
class Traffic:
    """Requests that come at random, `mean_s` apart, and what clients saw of them and of a job beside."""

    draw: random.Random
    mean_s: float
    started_s: float = 0.0
    next_s: float = 0.0
    tokens: float = 0.0
    """Finetuned: a third of each counts in forward, the rest in backward."""
    steps: int = 0
    arrived_s: dict[str, float] = field(default_factory=dict)
    emitted_s: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> None:
        self.started_s = self.next_s = time.monotonic()

    def come(self, name: str) -> None:
        self.arrived_s[name] = self.next_s
        self.next_s += self.draw.expovariate(1 / self.mean_s)

    def due(self) -> bool:
        return time.monotonic() >= self.next_s

    def take(self, events: list[Event]) -> None:
        for event in _checked(events):
            if isinstance(event, TokenBatch):
                for token in event.tokens:
                    self.emitted_s.setdefault(token.request_id, []).append(token.emitted_s)
            if isinstance(event, IterationDone):
                self.tokens += event.finetune_tokens / 3 + 2 * event.backward_tokens / 3
            self.steps += isinstance(event, StepDone)


def _checked(events: list[Event]) -> list[Event]:
    """Raises FailedError: what failed is no figure."""
    for event in events:
        if isinstance(event, RequestFailed | JobFailed):
            raise FailedError(event.message)
        if isinstance(event, StepDone) and event.skipped:
            raise FailedError(f"step {event.step} of {event.job} was not finite")
    return events


def _iteration(events: list[Event]) -> IterationDone | None:
    return next((event for event in events if isinstance(event, IterationDone)), None)


def _drain(engine: Engine) -> None:
    while not engine.idle:
        _checked(engine.step())


@dataclass
class Speed:
    """Steps on one engine, which the first of them makes. `found`: figures of steps that are done."""

    sizes: Sizes
    device: torch.device
    found: Callable[[str], Figures]
    _names: Iterator[int] = field(default_factory=itertools.count)

    def _made(self, layers: int) -> tuple[Engine, MemoryPlan | str]:
        """An engine, and what it was planned to take."""
        s = self.sizes
        with tempfile.TemporaryDirectory() as folder, drawn_weights():
            path = write_config(Path(folder), {**s.fields, "num_hidden_layers": layers})
            config = EngineConfig(
                str(path),
                max_model_length=s.max_model_length,
                max_batch_tokens=s.max_batch_tokens,
                max_requests=s.max_requests,
                kv_cache_bytes=s.kv_cache_bytes,
                tpot_s=0.05,
                dtype="bfloat16",
                device=str(self.device),
            )
            plan = planned(config, self.device)
            engine = Engine(config)
            engine.ready()
        return engine, plan

    @cached_property
    def _large(self) -> tuple[Engine, MemoryPlan | str]:
        """With as many layers as `sizing` found."""
        return self._made(self.found("sizing")["layers"])

    @property
    def engine(self) -> Engine:
        return self._large[0]

    @property
    def _rates(self) -> Rates:
        found = self.found("rates")
        return Rates(found["flops_per_s"], found["bytes_per_s"])

    # ---- steps ----

    def size(self, until: float) -> Figures:
        """Layers with which a step of finetuning takes `step_s`, by one with a single layer (and the head)."""
        with self._job(self._made(1)[0]) as step:
            step()
            taken_s = step()
        most = self.sizes.fields["num_hidden_layers"]
        layers = max(1, min(most, int(self.sizes.step_s / taken_s)))
        return {"layers": layers, "lines": [f"- {layers} of {most} layers; a step of one took {taken_s:.3f} s"]}

    def finetune(self, until: float) -> Figures:
        """Finetuning alone: tokens a second, of the time after a first step."""
        engine, plan = self._large
        reset_peak(self.device)
        with self._job(engine) as step:
            step()
            taken = [step()]
            while time.monotonic() + max(taken) < until:
                taken.append(step())
            found = memory(engine, self.device, plan)
        rate = 2 * self.sizes.sample / statistics.median(taken)
        least_us = sum(self._floor_us().values())
        lines = [
            f"- {rate:,.0f} tokens/s, {1e6 / rate:.1f} us a token: {1e6 / rate / least_us:.2f} x the floor of "
            f"{least_us:.1f} us ({len(taken)} steps of 2 x {self.sizes.sample} tokens)",
            *found["lines"],
        ]
        return {**found, "tokens_per_s": rate, "floor_us": least_us, "lines": lines}

    def budget(self, until: float) -> Figures:
        """One step, word by word: microseconds a token. Marks between words take time of their own."""
        words, tokens = Words(self.device, type(self.engine.executor.kernels)), 2 * self.sizes.sample
        with self._job(self.engine) as step:
            step()
            with words.watched():
                taken_s = step()
        least = self._floor_us()
        taken = {part: 1e6 * seconds / tokens for part, seconds in words.seconds().items()}
        taken["rest"] = 1e6 * taken_s / tokens - sum(taken.values())
        lines = ["", "| us a token | taken | floor | x |", "|---|---|---|---|"]
        for part in (*least, "rest"):
            us, floor_us = taken.get(part, 0.0), least.get(part, 0.0)
            ratio = f"{us / floor_us:.1f}" if floor_us else ""
            lines.append(f"| {part} | {us:.1f} | {floor_us:.2f} | {ratio} |")
        return {"us": taken, "floor_us": least, "lines": lines}

    def decode(self, rows: int, until: float) -> Figures:
        """Decode alone: milliseconds of an iteration in which `rows` requests of `context` tokens have a row each, and
        tokens a second of their prompts.
        """
        engine, context = self.engine, self.sizes.context
        most = self.sizes.max_model_length - context
        names = [f"decode-{next(self._names)}" for _ in range(rows)]
        for name in names:
            params = SamplingParams(most, ignore_eos=True)
            engine.submit(AddRequest(name, self._prompt(name, context), params, time.monotonic(), ttft_s=600.0))
        started, prompts_s, taken = time.perf_counter(), 0.0, []
        while len(taken) < 20 or (time.monotonic() < until and len(taken) < most - 1):
            before = time.perf_counter()
            done = _iteration(_checked(engine.step()))
            after = time.perf_counter()
            if done is not None and (done.decode_tokens, done.prefill_tokens) == (rows, 0):
                prompts_s = prompts_s or before - started
                taken.append(after - before)
            if engine.idle:
                raise FailedError(f"{rows} requests ended when only {len(taken)} iterations had a row of each")
        for name in names:
            engine.submit(Cancel(name))
        _drain(engine)
        ms = 1e3 * statistics.median(taken[2:])
        least_ms = floors.decode_ms(engine.executor.model, rows, context + len(taken) // 2, self._rates)
        prompts = rows * context / prompts_s
        lines = [
            f"- {ms:.2f} ms an iteration: {ms / least_ms:.2f} x the floor of {least_ms:.2f} ms "
            f"({len(taken)} iterations)",
            f"- prompts: {prompts:,.0f} tokens/s",
        ]
        return {"ms": ms, "floor_ms": least_ms, "prompt_tokens_per_s": prompts, "lines": lines}

    def both(self, load: int, until: float) -> Figures:
        """Finetuning beside requests that come at random at `load` percent of the rate that decode and prompts alone
        could take: at 100 % one comes whenever the one before is computed, by the figures of the largest decode.
        """
        s, engine, alone = self.sizes, self.engine, self.found(f"decode {max(ROWS)}")
        request_s = s.context / alone["prompt_tokens_per_s"] + s.output * alone["ms"] / 1e3 / max(ROWS)
        traffic = Traffic(random.Random(load), 100 * request_s / load)
        with self._job(engine) as step:
            step()
            traffic.start()
            while (now := time.monotonic()) < until:
                while step.submitted < traffic.steps + 3:  # the first was run alone
                    step.submit()
                while traffic.next_s <= now:
                    name, came_s = f"both-{next(self._names)}", traffic.next_s
                    traffic.come(name)
                    params = SamplingParams(s.output, ignore_eos=True)
                    engine.submit(AddRequest(name, self._prompt(name, s.context), params, came_s))
                traffic.take(engine.step(traffic.due, traffic.take))
            machine.wait(self.device)
            taken_s = time.monotonic() - traffic.started_s
            for name in traffic.arrived_s:
                engine.submit(Cancel(name))
        seen, arrived = traffic.emitted_s, traffic.arrived_s
        gaps = sorted(b - a for times in seen.values() for a, b in itertools.pairwise(times))
        firsts = sorted(times[0] - arrived[name] for name, times in seen.items())
        rate, best = traffic.tokens / taken_s, self.found("finetuning alone")["tokens_per_s"]
        figures = {"tokens_per_s": rate, "of_alone": rate / best, "requests": len(arrived), "request_s": request_s}
        lines = [f"- {rate:,.0f} tokens/s finetuned, {rate / best:.0%} of alone; {len(arrived)} requests came"]
        for name, values, promise in (
            ("gap", gaps, engine.config.tpot_s),
            ("first token", firsts, engine.config.ttft_s),
        ):
            if values:
                half, most = (1e3 * values[int(q * (len(values) - 1))] for q in (0.5, 0.99))
                kept = sum(value <= promise for value in values) / len(values)
                figures[name] = {"p50_ms": half, "p99_ms": most, "kept": kept}
                lines.append(
                    f"- {name}: median {half:.1f} ms, p99 {most:.1f} ms, {kept:.1%} within {promise * 1e3:.0f}"
                )
        return {**figures, "lines": lines}

    # ---- parts of them ----

    def _floor_us(self) -> dict[str, float]:
        return floors.finetune_us(self.engine.executor.model, self.sizes.sample, RANK, self._rates)

    def _prompt(self, name: str, length: int) -> tuple[int, ...]:
        """No other has it: a prefix cache would spoil the times."""
        source = random.Random(name)
        return tuple(source.randrange(self.sizes.fields["vocab_size"]) for _ in range(length))

    @contextmanager
    def _job(self, engine: Engine) -> Iterator[Job]:
        job = Job(engine, f"job-{next(self._names)}", self.sizes, self.device)
        try:
            yield job
        finally:
            engine.submit(StopJob(job.job))
            _drain(engine)
