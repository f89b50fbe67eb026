"""Whatever requests and jobs ask of a device was asked at start-up: nobody waits for an operator to be loaded."""

from __future__ import annotations

from typing import Any

import mixed
import pytest
import torch
from engine_driver import late_driver
from tables import use_torch
from torch.utils._python_dispatch import TorchDispatchMode

from coserve_engine import engine

Operator = tuple[str, tuple[str, ...]]


class Operators(TorchDispatchMode):
    """Those that compute, with the dtypes of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Operator] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            given = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
            dtypes = tuple(sorted({str(one.dtype) for one in given if isinstance(one, torch.Tensor)}))
            self.seen.add((str(func), dtypes))
        return func(*args, **(kwargs or {}))


def first_used_later(plain: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Operators of a run with everything in it that no start-up used, on a device that computes behind its host."""
    use_torch(monkeypatch)
    d = late_driver(plain, {**mixed.TIGHT, "threads": 1})
    with Operators() as at_start:
        d.engine.ready()
    with Operators() as later:
        mixed.run(d, d.step)
    assert len(later.seen) > 50
    return {f"{name} {dtypes}" for name, dtypes in later.seen - at_start.seen}


def test_no_operator_is_first_used_by_a_request(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = first_used_later(plain, monkeypatch)
    assert sorted(found) == []


def test_without_rehearsal_some_are(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(engine, "rehearse", lambda executor: None)
    assert any("sort" in name for name in first_used_later(plain, monkeypatch))
