"""An engine driven to its end, by a clock that the test moves, and the events of one in a process of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from coserve_engine.config import EngineConfig
from coserve_engine.device.fake import BehindDevice
from coserve_engine.engine import Engine
from coserve_engine.host import EngineHost
from coserve_engine.messages import (
    Command,
    Event,
    JobFailed,
    RequestFailed,
    StartJob,
    TokenBatch,
)
from coserve_engine.model import executor
from coserve_engine.scheduler.timeline import Timeline

E = TypeVar("E")
PATIENCE_S = 180.0


def gather(host: EngineHost, enough: Callable[[list[Event]], bool]) -> list[Event]:
    """Events until there are enough."""
    found: list[Event] = []
    end = time.monotonic() + PATIENCE_S
    while not enough(found):
        assert time.monotonic() < end, f"no end in sight; got {found[-5:]}"
        found += host.events(0.2)
    return found


class FakeClock:
    """Moves by itself a little at each look, evenly or at random, and otherwise when it is told."""

    def __init__(self, jitter_s: float = 0.0, seed: int = 0) -> None:
        self.now, self._jitter_s, self._random = 1.0, jitter_s, random.Random(seed)

    def __call__(self) -> float:
        self.now += self._jitter_s * self._random.uniform(0.5, 1.0)
        return self.now


class Driver:
    """An engine, what came out of it, and a limit so that a test never hangs."""

    def __init__(self, engine: Engine, clock: FakeClock) -> None:
        self.engine, self.clock = engine, clock
        self.events: list[Event] = []

    def submit(self, *commands: Command) -> None:
        """A job's state is read before this returns: what follows does not depend on the pace of a thread."""
        for command in commands:
            self.engine.submit(command)
            if isinstance(command, StartJob):
                self.engine._files._thread.submit(int).result()

    def step(self, interrupted: Callable[[], bool] = lambda: False) -> list[Event]:
        events = self.engine.step(interrupted)
        self.events += events
        return events

    def run(self, interrupted: Callable[[], bool] = lambda: False, limit: int = 200_000) -> Driver:
        """Until nothing is left to do."""
        for _ in range(limit):
            if self.engine.idle:
                return self
            if not self.step(interrupted):  # a loop that spins would starve the threads
                if not self.engine._files.idle:
                    self.engine._files._thread.submit(int).result()
                if self.engine.serving.compiling.waiting:
                    self.engine.serving.compiler._thread.submit(int).result()
        raise AssertionError(f"the engine did not come to rest; last events {self.events[-5:]}")

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def one(self, kind: type[E]) -> E:
        (event,) = self.of(kind)
        return event

    @property
    def failures(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, RequestFailed | JobFailed)]

    def tokens(self) -> dict[str, list[int]]:
        """Tokens by request."""
        found: dict[str, list[int]] = {}
        for batch in self.of(TokenBatch):
            for token in batch.tokens:
                found.setdefault(token.request_id, []).append(token.token)
        return found

    def parameters(self, job: str = "job") -> torch.Tensor:
        """The job's adapter as one vector, copied."""
        layers = self.engine.jobs[job].weights.layers
        return torch.cat([x.flatten() for layer in layers for pair in layer.values() for x in (pair.a, pair.b)])


def late_driver(
    path: str, settings: dict[str, Any], seed: int = 0, slow_s: float = 2e-3, jitter_s: float = 1e-5
) -> Driver:
    """Of an engine whose device is late by times drawn from a seed; engines made after it have their own."""
    clock = FakeClock(jitter_s, seed)

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    device = BehindDevice(torch.device("cpu"), clock, pass_time, random.Random(seed), slow_s)
    with mock.patch.object(executor, "device_of", lambda _: device):
        return Driver(Engine(EngineConfig(path, **settings), clock), clock)


def depths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many forwards are unseen, at each that is enqueued."""
    seen: list[int] = []
    enqueue = Timeline.enqueue

    def spy(self: Timeline, predicted_s: float, now: float, *, forward: bool = False) -> int:
        if forward:
            seen.append(self.unseen)
        return enqueue(self, predicted_s, now, forward=forward)

    monkeypatch.setattr(Timeline, "enqueue", spy)
    return seen
