"""What a thread that reads and writes files copies takes no turn of what is computed: the order of its stream, with one
that stands in for a GPU's, and the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from coserve_engine.device import cuda
from coserve_engine.device.cuda import ALIGN, CudaDevice

CPU = torch.device("cpu")


class Streams:
    """Says what is done in which stream, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def wait_stream(self, other: str) -> None:
        self.said.append(f"files waits for {other}")

    def synchronize(self) -> None:
        self.said.append("host waits for files")

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        self.said.append("into files")
        yield
        self.said.append("out of files")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.cuda, "stream", made.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the computing one")
    return made


@pytest.fixture
def device(streams: Streams) -> CudaDevice:
    return CudaDevice(CPU, None, streams, None, None)  # type: ignore[arg-type]


def test_what_is_carried_is_there_and_as_it_was(device: CudaDevice, streams: Streams) -> None:
    values = [torch.randn(3, 5), torch.tensor(7.0), torch.randn(8, 6, dtype=torch.bfloat16), torch.zeros(0, 4)]
    there = device.carry(values)
    assert [x.dtype for x in there] == [x.dtype for x in values]
    assert all(map(torch.equal, there, values))
    base = there[0].data_ptr()
    assert all((x.data_ptr() - base) % ALIGN == 0 for x in there[:3])
    waits = "files waits for the computing one"
    assert streams.said == [waits, "into files", "out of files", "host waits for files"]


def test_it_is_one_copy(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for all that is enqueued."""
    parts = cuda._like
    seen: list[int] = []

    def spy(block: torch.Tensor, *args: Any) -> list[torch.Tensor]:
        seen.append(block.data_ptr())
        return parts(block, *args)

    monkeypatch.setattr(cuda, "_like", spy)
    there = device.carry([torch.ones(4, 4) for _ in range(9)])
    assert len(seen) == 2
    assert {x.untyped_storage().data_ptr() for x in there} == {seen[1]}


def test_what_is_brought_was_computed_before(device: CudaDevice, streams: Streams) -> None:
    values = torch.randn(9)
    assert torch.equal(device.bring(values), values)
    assert streams.said == ["files waits for the computing one", "into files", "out of files"]
