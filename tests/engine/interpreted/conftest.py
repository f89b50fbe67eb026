"""Kernels in Triton's interpreter, which is chosen when triton is imported: `TRITON_INTERPRET=1 pytest
tests/engine/interpreted`, a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from coserve_engine.device.fake import BehindDevice, Recorded

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    import faithful

    faithful.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What is multiplied."""
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def _filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write is seen: new tensors hold NaN, or -1."""
    for name in ("empty", "empty_like"):
        real: Callable[..., torch.Tensor] = getattr(torch, name)

        def filled(*args: Any, real: Callable[..., torch.Tensor] = real, **kwargs: Any) -> torch.Tensor:
            made = real(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else -1)

        monkeypatch.setattr(torch, name, filled)
    yield


@pytest.fixture
def raced() -> Callable[[Callable[[], tuple[torch.Tensor, ...]]], tuple[torch.Tensor, ...]]:
    """Call a function of kernels in several orders of their programs: no two touch one address, and the bits are the
    same. Returns what it gave.
    """

    def run(function: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        with faithful.watch() as seen:
            first = function()
        assert seen.launches
        assert seen.clashes() == []
        for seed in (1, 2):
            faithful.order(seed)
            for a, b in zip(first, function(), strict=True):
                assert torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))
        return first

    return run


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs of a device that is not there hold launches too; how many steps each replay had."""
    from coserve_engine.kernels.triton import launch  # noqa: PLC0415  (others run without triton)

    real, capture, replay = launch.run, BehindDevice.capture, Recorded.replay
    seen: list[int] = []
    active: list[list[Any]] = []

    def run(*arguments: Any) -> None:
        real(*arguments)
        if active:
            active[-1].append(partial(real, *arguments))

    def watched(self: BehindDevice, compute: Callable[[], None]) -> Recorded:
        def listed() -> None:
            *_, graph = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            active.append(graph.steps)
            compute()
            active.pop()

        return capture(self, listed)

    def counted(self: Recorded) -> None:
        seen.append(len(self.steps))
        replay(self)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(BehindDevice, "capture", watched)
    monkeypatch.setattr(Recorded, "replay", counted)
    return seen
