"""Copies of a CUDA device through pinned memory. torch's allocator of pinned memory is the ring: it gives a block out
again when the copies that it took part in are over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.device.protocol import Columns, Mark, Rows, Staged

LOOK_S = 2e-5
ALIGN = 256
"""Bytes, as torch's own allocator."""
REST_S = 1e-3
"""A device that has nothing to do is through with a mark by then."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A copy into pinned memory [N], which is over when `event` is."""

    host: torch.Tensor
    event: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def get(self) -> list[float]:
        self.event.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


class Clock:
    """Maps events to the host's clock: each is so long after the one that was asked before, since the milliseconds
    between two are a float32.
    """

    def __init__(self, device: torch.device) -> None:
        self._last = self._event(device)
        self._last.synchronize()
        self._last_s = time.monotonic()

    @staticmethod
    def _event(device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def mark(self, device: torch.device) -> EventMark:
        now = time.monotonic()
        return EventMark(self, self._event(device), now)

    def at_s(self, event: torch.cuda.Event, after_s: float, until_s: float) -> float:
        """Of an event that is over, later than the last one that was asked and, as the host saw, between these times:
        two clocks drift.
        """
        at_s = self._last_s + self._last.elapsed_time(event) / 1e3
        self._last, self._last_s = event, min(max(at_s, after_s), until_s)
        return self._last_s


@dataclass(slots=True)
class EventMark:
    """A mark of a stream."""

    clock: Clock
    event: torch.cuda.Event
    after_s: float
    """When it was not over yet."""
    until_s: float | None = None
    """When it was."""
    known_s: float | None = None

    def over(self) -> bool:
        if self.until_s is None:
            now = time.monotonic()
            if self.event.query():  # type: ignore[no-untyped-call]
                self.until_s = time.monotonic()
            else:
                self.after_s = now
        return self.until_s is not None

    def at_s(self) -> float:
        if not self.over() or self.until_s is None:
            raise RuntimeError("a mark was asked for its time before it was over")
        if self.known_s is None:
            self.known_s = self.clock.at_s(self.event, self.after_s, self.until_s)
        return self.known_s


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """`Device` whose copies are of the current stream, as all that is computed; those of `files` beside it."""

    device: torch.device
    clock: Clock
    files: torch.cuda.Stream
    branch: torch.cuda.Stream
    pool: Any
    """Of all graphs, of which one is replayed at a time."""
    behind: bool = True

    @classmethod
    def of(cls, device: torch.device) -> CudaDevice:
        files, branch = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        return cls(device, Clock(device), files, branch, torch.cuda.graph_pool_handle())

    def reserve(self, size: int) -> None:
        """torch keeps what was freed, and gives it out again in parts."""
        torch.empty(size, dtype=torch.uint8, device=self.device)

    def mark(self) -> EventMark:
        return self.clock.mark(self.device)

    def rest(self) -> None:
        """Both clocks are looked at: in an hour without work they drift apart by more than an iteration."""
        mark = self.mark()
        self.wait(mark, REST_S)
        if mark.over():
            mark.at_s()

    def wait(self, mark: Mark | None, seconds: float) -> None:
        """By looking again and again: the host learns of a mark within LOOK_S."""
        until = time.monotonic() + seconds
        while not (mark is not None and mark.over()) and time.monotonic() < until:
            time.sleep(LOOK_S)

    def stage(self, values: Rows, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def stage_columns(self, columns: Columns) -> Staged:
        count = len(columns.all_ints)
        host = torch.empty(count + len(columns.all_floats), dtype=torch.int64, pin_memory=True)
        host[:count] = torch.tensor(columns.all_ints, dtype=torch.int64)
        host[count:].view(torch.float64).copy_(torch.tensor(columns.all_floats, dtype=torch.float64))
        staged = host.to(self.device, non_blocking=True)
        return Staged(staged[:count], staged[count:].view(torch.float64))

    def fetch(self, values: torch.Tensor) -> Fetched:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return Fetched(host, event)

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A thread of files may ask for memory meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            run()
        return graph

    def beside(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """On a stream of its own, a branch of a graph that is captured. What `run` allocates is of that stream, and is
        given out again there alone: after the next branch began, for which all that used it was enqueued.
        """
        self.branch.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.branch):
            made = run()

        def end() -> Any:
            torch.cuda.current_stream(self.device).wait_stream(self.branch)
            return made

        return end

    def carry(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """By one copy: each waits for all that is enqueued, since the memory that it is given may be in use until then.
        That memory is of the current stream's pool, as it is used there.
        """
        sizes = [-(-value.nbytes // ALIGN) * ALIGN for value in values]
        host = torch.empty(sum(sizes), dtype=torch.uint8)
        there = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        for into, value in zip(_like(host, sizes, values), values, strict=True):
            into.copy_(value)
        self.files.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.files):
            there.copy_(host)
        self.files.synchronize()
        return _like(there, sizes, values)

    def bring(self, values: torch.Tensor) -> torch.Tensor:
        self.files.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.files):
            return values.cpu()


def _like(block: torch.Tensor, sizes: list[int], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Parts of so many bytes of a block, each as one of the `values` in shape and dtype."""
    parts = zip(torch.split(block, sizes), values, strict=True)
    return [part[: value.nbytes].view(value.dtype).view(value.shape) for part, value in parts]
