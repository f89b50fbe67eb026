"""Engines on a table of kernels that a test chooses."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_engine.kernels.fake.table import FakeKernels
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.model import executor


def use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors made from now on compute by plain operators, whatever the dtype."""

    def select(config: Any, numerics: Any, dtypes: Any, rope: Any, *, backward: bool) -> TorchKernels:
        return TorchKernels.create(config, numerics, dtypes, rope)

    monkeypatch.setattr(executor, "select", select)


def use_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors made from now on compute nothing."""

    def select(config: Any, numerics: Any, dtypes: Any, rope: Any, *, backward: bool) -> FakeKernels:
        return FakeKernels(config, dtypes, rope.device)

    monkeypatch.setattr(executor, "select", select)
