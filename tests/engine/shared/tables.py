"""Engines on a table of kernels that a test chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coserve_engine.kernels.fake.table import FakeKernels
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.model import executor

if TYPE_CHECKING:
    import pytest


def plain_operators(config: Any, numerics: Any, dtypes: Any, rope: Any, **how: bool) -> TorchKernels:
    """In the place of `select`: the table of plain operators, whatever the dtype."""
    return TorchKernels.create(config, numerics, dtypes, rope)


def use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors made from now on compute by plain operators, whatever the dtype."""
    monkeypatch.setattr(executor, "select", plain_operators)


def use_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors made from now on compute nothing."""

    def select(config: Any, numerics: Any, dtypes: Any, rope: Any, **how: bool) -> FakeKernels:
        return FakeKernels(config, numerics, dtypes, rope)

    monkeypatch.setattr(executor, "select", select)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors made from now on compute by kernels in Triton, which are interpreted, whatever the dtype."""
    from coserve_engine.kernels.triton.exact import ExactKernels  # noqa: PLC0415  (others run without triton)
    from coserve_engine.kernels.triton.table import TritonKernels  # noqa: PLC0415

    def select(config: Any, numerics: Any, dtypes: Any, rope: Any, *, exact: bool = False, **how: bool) -> Any:
        return (ExactKernels if exact else TritonKernels).create(config, numerics, dtypes, rope)

    monkeypatch.setattr(executor, "select", select)
