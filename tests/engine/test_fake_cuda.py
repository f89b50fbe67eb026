"""A mixed run on a GPU that is not there: tensors without values on the device "cuda". Reading one would raise, and so
does an operator whose tensors lie on two devices or do not fit in shape or dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, FakeClock
from mixed import TIGHT, TIGHT_PAGES, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from coserve_engine.config import EngineConfig
from coserve_engine.device.fake import At, BehindDevice
from coserve_engine.engine import Engine
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.model import executor, loading
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache

CUDA = torch.device("cuda")


class NoValues(BehindDevice):
    """Hands back ones: all is finite, and every token the same."""

    def fetch(self, values: torch.Tensor) -> At:
        return At(self, self._later(), [1.0] * values.numel())


class Here:
    """A thread's place: modes of torch hold in their own thread alone."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def empty_tensors(folder: Path, shapes: Any, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Any]]:
    """In the place of `read_tensors`: safetensors maps files, which have values."""
    names = [name for name in shapes if name != "lm_head.weight" or not read_model_config(folder).tied]
    return ((name, torch.empty(shapes[name], dtype=dtype, device=device)) for name in names)


@pytest.fixture
def gpu(model_path: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """A driver of an engine on it."""
    monkeypatch.setattr(loading, "read_tensors", empty_tensors)

    stack = ExitStack()

    def make(model: str, dtype: str) -> Driver:
        path, numerics = model_path(model), TIGHT["numerics"]
        page_bytes = KVCache.page_bytes(read_model_config(Path(path)), numerics, Dtypes.of(dtype).cache)
        settings = {**TIGHT, "kv_cache_bytes": TIGHT_PAGES * page_bytes}
        config = EngineConfig(path, device="cuda", dtype=dtype, threads=1, **settings)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        clock = FakeClock(1e-5)

        def pass_time(seconds: float) -> None:
            clock.now += seconds

        device = NoValues(CUDA, clock, pass_time, random.Random(0))
        monkeypatch.setattr(executor, "device_of", lambda _: device)
        driver = Driver(Engine(config, clock), clock)
        driver.engine._files._thread = Here()  # type: ignore[assignment]
        return driver

    with stack:
        yield make


@pytest.mark.parametrize(
    ("model", "dtype"), [("plain", "bfloat16"), ("qwen2", "float32"), ("qwen3", "bfloat16"), ("mistral", "bfloat16")]
)
def test_a_mixed_run_reads_nothing_and_mixes_no_devices(gpu: Any, model: str, dtype: str) -> None:
    d = gpu(model, dtype)
    run(d, d.step, every=2)
    kernels = d.engine.executor.kernels
    assert isinstance(kernels, TorchKernels)
    assert str(kernels.dtypes.compute) == f"torch.{dtype}"
    assert kernels.rope.device.type == "cuda"
    assert d.engine.executor.copies.waits == 0


def _number(x: torch.Tensor) -> object:
    return float(x.sum())


def _chosen(x: torch.Tensor) -> object:
    return x[x > 0]


def _elsewhere(x: torch.Tensor) -> object:
    return x + torch.ones(x.shape[-1])


@pytest.mark.parametrize("bad", [_number, _chosen, _elsewhere], ids=lambda f: f.__name__)
def test_what_a_gpu_would_not_do_is_seen(gpu: Any, monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    """The control: as if it stood in a kernel."""
    gate = TorchKernels.gate

    def broken(self: Any, *arguments: Any) -> torch.Tensor:
        bad(arguments[0])
        return gate(self, *arguments)

    monkeypatch.setattr(TorchKernels, "gate", broken)
    d = gpu("plain", "bfloat16")
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        run(d, d.step)
