"""A device's marks on the host's clock, with events that stand in for a GPU's: the two clocks drift apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from coserve_engine.device import cuda
from coserve_engine.device.cuda import CudaDevice

CUDA = torch.device("cuda")
IDLE_S = 0.25


@dataclass
class Machine:
    """A host whose clock says `now`, and a device whose clock gains `drift` on it."""

    drift: float
    now: float = 1000.0
    busy_s: float = 0.0
    """When the device is through with what it has."""

    def monotonic(self) -> float:
        self.now += 1e-7
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def compute(self, seconds: float) -> None:
        self.busy_s = max(self.busy_s, self.now) + seconds


@dataclass
class Event:
    """In the place of torch's."""

    machine: Machine
    at_s: float = field(default=0.0)

    def record(self, stream: Any) -> None:
        self.at_s = max(self.machine.busy_s, self.machine.now) + 5e-6

    def synchronize(self) -> None:
        self.machine.now = max(self.machine.now, self.at_s)

    def query(self) -> bool:
        return self.machine.now >= self.at_s

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        ms = 1e3 * (end.at_s - self.at_s) * (1 + self.machine.drift)
        return float(torch.tensor(ms, dtype=torch.float32))


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, float]]:
    """After an hour without work, of when a forward of 5 ms began and of how long it took, in seconds."""

    def make(drift: float, *, rests: bool) -> tuple[float, float]:
        machine = Machine(drift)
        monkeypatch.setattr(cuda, "time", machine)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(machine))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        return measured(machine, rests=rests)

    return make


def measured(machine: Machine, *, rests: bool) -> tuple[float, float]:
    device = CudaDevice.of(CUDA)
    for _ in range(int(3600 / IDLE_S)):
        machine.sleep(IDLE_S)
        if rests:
            device.rest()
    begins_s = machine.now
    start = device.mark()
    machine.compute(5e-3)
    end = device.mark()
    machine.sleep(3e-3)  # until all of it is enqueued
    while not (start.over() and end.over()):
        device.wait(end, 5e-4)
    start_s, end_s = start.at_s(), end.at_s()
    return abs(start_s - begins_s), abs(end_s - start_s - 5e-3)


@pytest.mark.parametrize("drift", [-5e-5, 5e-5])
def test_a_forward_after_an_hour_of_rest_is_measured_as_any_other(errors: Any, drift: float) -> None:
    assert max(errors(drift, rests=True)) < 2e-4


def test_without_a_rest_the_clocks_drift_apart(errors: Any) -> None:
    """The control."""
    assert max(errors(5e-5, rests=False)) > 2e-3


def test_a_mark_is_never_before_it_was_made(errors: Any) -> None:
    """Or what began so early would have taken all the time until it was seen to be under way."""
    assert max(errors(-5e-5, rests=False)) < 2e-4
