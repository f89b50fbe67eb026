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
from compiled import recorded
from engine_driver import Driver, FakeClock
from mixed import TIGHT, TIGHT_PAGES, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from coserve_engine.config import EXACT, FAST, EngineConfig
from coserve_engine.device.fake import At, BehindDevice
from coserve_engine.engine import Engine
from coserve_engine.errors import EngineConfigError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.kernels import fallback
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.kernels.triton import lora_tables, table
from coserve_engine.kernels.triton.exact import ExactKernels
from coserve_engine.kernels.triton.table import TritonKernels
from coserve_engine.model import executor, loading
from coserve_engine.model.rehearsal import rehearse
from coserve_engine.precompile import empty_tensors
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


@pytest.fixture
def gpu(model_path: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """A driver of an engine on it."""
    monkeypatch.setattr(loading, "read_tensors", empty_tensors)

    stack = ExitStack()

    def make(model: str, dtype: str, *, kernels: bool = False, mode: str = FAST) -> Driver:
        path, numerics = model_path(model), TIGHT["numerics"]
        page_bytes = KVCache.page_bytes(read_model_config(Path(path)), numerics, Dtypes.of(dtype).cache)
        settings = {**TIGHT, "kv_cache_bytes": TIGHT_PAGES * page_bytes}
        modes: dict[str, Any] = {"numerics_mode": mode, "kernel_fallback": not kernels}
        config = EngineConfig(path, device="cuda", dtype=dtype, threads=1, **modes, **settings)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        clock = FakeClock(1e-5)

        def pass_time(seconds: float) -> None:
            clock.now += seconds

        device = NoValues(CUDA, clock, pass_time, random.Random(0))
        monkeypatch.setattr(executor, "device_of", lambda _: device)
        monkeypatch.setattr(fallback, "triton_trouble", lambda: None if kernels else "no")
        monkeypatch.setattr(table, "is_hopper", lambda device: True)
        monkeypatch.setattr(lora_tables, "address_of", lambda tensor: 16)
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
    rehearse(d.engine.executor)
    d.engine.executor.copies.waits = 0
    run(d, d.step, every=2)
    kernels = d.engine.executor.kernels
    assert isinstance(kernels, TorchKernels)
    assert str(kernels.dtypes.compute) == f"torch.{dtype}"
    assert kernels.rope.device.type == "cuda"
    assert d.engine.executor.copies.waits == 0


@pytest.mark.parametrize(("model", "dtype"), [("plain", "bfloat16"), ("mistral", "float32"), ("qwen3", "bfloat16")])
def test_kernels_are_launched_as_they_were_at_start_up(gpu: Any, model: str, dtype: str) -> None:
    """By requests of every kind and a job: nothing is compiled later."""
    assert launched_later(gpu, model, dtype, rehearsed=True) == []


@pytest.mark.parametrize(("model", "dtype"), [("plain", "bfloat16"), ("qwen3", "float32")])
def test_so_are_those_of_one_configuration(gpu: Any, model: str, dtype: str) -> None:
    assert launched_later(gpu, model, dtype, rehearsed=True, mode=EXACT) == []


def test_without_rehearsal_some_are_not(gpu: Any) -> None:
    """The control."""
    assert len(launched_later(gpu, "plain", "bfloat16", rehearsed=False)) > 5


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_leave_nothing_to_plain_operators(gpu: Any, monkeypatch: pytest.MonkeyPatch, *, kernels: bool) -> None:
    """Of the words that they say; without them, which is the control, all are called but the one that computes again
    what a bound of bytes did not let a pass keep.
    """
    called: set[str] = set()

    def watched(word: str, said: Any) -> Any:
        def say(*arguments: Any, **how: Any) -> Any:
            called.add(word)
            return said(*arguments, **how)

        return say

    d = gpu("qwen3", "bfloat16", kernels=kernels)
    e = d.engine.executor
    assert fallback.plain_words(e.kernels, e.device, e.dtypes) == (() if kernels else fallback.OURS)
    for word in fallback.OURS:
        monkeypatch.setattr(TorchKernels, word, watched(word, getattr(TorchKernels, word)))
    with recorded():
        rehearse(e)
        run(d, d.step, every=2)
    assert called == (set() if kernels else {*fallback.OURS} - {"linear_again"})


def test_without_kernels_an_engine_for_a_gpu_does_not_start(
    model_path: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At default settings; no weight is read before."""
    monkeypatch.setattr(loading, "read_tensors", None)
    monkeypatch.setattr(fallback, "triton_trouble", lambda: "none")
    monkeypatch.setattr(executor, "device_of", lambda device: None)
    path = model_path("plain")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(EngineConfigError, match=r"engine\.kernelFallback is Forbidden.*triton cannot be used: none"),
    ):
        Engine(EngineConfig(path, device="cuda", dtype="bfloat16", max_model_length=256))


def launched_later(gpu: Any, model: str, dtype: str, *, rehearsed: bool, mode: str = FAST) -> list[str]:
    """Kinds of launches of a run with everything in it that no start-up had."""
    d = gpu(model, dtype, kernels=True, mode=mode)
    exact = mode == EXACT
    with recorded() as at_start:
        if rehearsed:
            rehearse(d.engine.executor)
        assert d.engine.executor.capture() > 1 or exact
    d.engine.executor.copies.waits = 0
    with recorded() as later:
        run(d, d.step, every=2)
    assert type(d.engine.executor.kernels) is (ExactKernels if exact else TritonKernels)
    assert len(later) > 20
    assert any(one.name == "gemm._gemm" for one in later) == exact
    assert d.engine.executor.copies.waits == 0
    return sorted(f"{one.name} {sorted(one.even)} {dict(one.constants)}" for one in later - at_start)


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
