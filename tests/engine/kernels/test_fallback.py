"""A GPU that would compute without its kernels is refused, with field, value and remedy, or counted and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coserve_engine.config import ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.kernels import fallback
from coserve_engine.kernels.fallback import OURS, plain_words, unfit
from coserve_engine.kernels.protocol import Kernels
from coserve_engine.kernels.select import select
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.kernels.triton.table import TritonKernels
from coserve_engine.messages import PlainReason
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.dtypes import Dtypes

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BFLOAT16 = Dtypes.of("bfloat16")
NO_WORDS = {"__init__", "bind", "bind_unit", "notes"}
"""Methods of a table that compute nothing of an iteration."""


@pytest.fixture
def model(plain: str, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """One that kernels can compute, where triton works."""
    monkeypatch.setattr(fallback, "triton_trouble", lambda: None)
    return read_model_config(Path(plain))


def test_the_words_that_have_kernels_are_those_of_the_table() -> None:
    said = {name for name, value in vars(Kernels).items() if callable(value) and name in vars(TritonKernels)}
    assert set(OURS) == said - NO_WORDS
    assert len(set(OURS)) == len(OURS)


def test_words_without_their_kernels_are_counted() -> None:
    class Half(TritonKernels):
        gate = TorchKernels.gate

    def words(table: type, device: torch.device, dtype: str = "bfloat16") -> tuple[str, ...]:
        return plain_words(object.__new__(table), device, Dtypes.of(dtype))

    assert words(TritonKernels, CUDA) == ()
    assert words(Half, CUDA) == ("gate",)
    assert words(TorchKernels, CUDA) == OURS
    assert words(TorchKernels, CPU) == ()
    assert words(TorchKernels, CUDA, "float64") == ()


@pytest.mark.parametrize("size", [24, 80, 96, 256])
def test_heads_that_kernels_take(model: ModelConfig, size: int) -> None:
    assert unfit(replace(model, head_size=size)) is None


@pytest.mark.parametrize(
    ("changed", "reason", "said"),
    [
        ({"head_size": 272}, PlainReason.HEAD_SIZE, "head_dim is 272, and they take even ones up to 256"),
        ({"head_size": 17}, PlainReason.HEAD_SIZE, "head_dim is 17,"),
        ({"hidden": 2056}, PlainReason.WIDTH, "q_proj is 2056 x 64, and 2056 does not divide by 16"),
        ({"intermediate": 150}, PlainReason.WIDTH, "gate_proj is 64 x 150, and 150 does not divide by 16"),
        ({"head_size": 20, "kv_heads": 2}, PlainReason.WIDTH, "k_proj is 64 x 40, and 40 does not divide by 16"),
    ],
)
def test_models_that_they_do_not_take(
    model: ModelConfig, changed: dict[str, Any], reason: PlainReason, said: str
) -> None:
    odd = replace(model, **changed)
    found = unfit(odd)
    assert found is not None
    assert found.reason is reason
    assert said in found.said
    refused(odd, said)


def test_triton_that_does_not_work(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "triton_trouble", lambda: "ModuleNotFoundError: No module named 'triton'")
    refused(model, "triton cannot be used: ModuleNotFoundError: No module named 'triton'; use the agent's image")


def refused(model: ModelConfig, said: str) -> None:
    """On a GPU unless it is allowed; a CPU computes it as ever."""
    arguments = (model, Numerics(), BFLOAT16)
    rope = SimpleNamespace(device=CUDA, shape=(2, 64, model.head_size), dtype=torch.float32)
    with pytest.raises(EngineConfigError) as caught:
        select(*arguments, rope, backward=True, fallback=False)  # type: ignore[arg-type]
    for words in ("engine.kernelFallback is Forbidden", said, "set engine.kernelFallback to Allowed"):
        assert words in str(caught.value)
    here = torch.zeros(2, 64, model.head_size)
    assert type(select(*arguments, here, backward=True, fallback=False)) is TorchKernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_says_why_it_does_not_work() -> None:
    said = fallback.triton_trouble()
    assert said is not None
    assert "active drivers" in said
