"""What is computed beside something else: the order of two streams, with some that stand in for a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from coserve_engine.device.cuda import CudaDevice


@dataclass(frozen=True)
class Stream:
    name: str
    said: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_a_branch_begins_after_what_was_enqueued_and_ends_before_what_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    current = [Stream("main", said)]

    @contextmanager
    def use(stream: Any) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    branch: Any = Stream("branch", said)
    device = CudaDevice(torch.device("cpu"), None, None, branch, None)  # type: ignore[arg-type]

    def run(what: str) -> str:
        said.append(f"{what} on {current[-1].name}")
        return what

    end = device.beside(lambda: run("small"))
    run("large")
    assert end() == "small"
    run("both")
    begun, ended = "branch waits for main", "main waits for branch"
    assert said == [begun, "small on branch", "large on main", ended, "both on main"]
