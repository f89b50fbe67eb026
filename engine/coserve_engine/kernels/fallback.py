"""Where a GPU would compute by plain operators though there are kernels for it: in which words, and why."""

from __future__ import annotations

import importlib
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.messages import PlainReason
from coserve_engine.tensors.dtypes import Dtypes

OURS = (
    "norm",
    "linear",
    "encode",
    "attend",
    "gate",
    "keep",
    "sample",
    "log_probabilities",
    "score",
    "score_backward",
    "norm_backward",
    "linear_again",
    "linear_backward",
    "encode_again",
    "attend_backward",
    "encode_backward",
    "gate_again",
    "gate_backward",
)
"""The words that `kernels.triton` says by kernels of its own."""
EVEN, LARGEST_HEAD = 16, 256
"""Widths of linears divide by the one; heads are even and no larger than the other."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why kernels of ours cannot compute, and what to say of it."""

    reason: PlainReason
    said: str


def has_kernels(device: torch.device, dtypes: Dtypes) -> bool:
    """Whether there are kernels of ours for such a device in such dtypes."""
    return device.type == "cuda" and dtypes.accumulate is torch.float32


def plain_words(kernels: object, device: torch.device, dtypes: Dtypes) -> tuple[str, ...]:
    """The words of OURS that a table says by plain operators where there are kernels."""
    if not has_kernels(device, dtypes):
        return ()
    table = type(kernels)
    return tuple(word for word in OURS if getattr(table, word) is getattr(TorchKernels, word))


def unfit(config: ModelConfig) -> Unfit | None:
    """Why they cannot compute such a model here, if so."""
    size = config.head_size
    if size > LARGEST_HEAD or size % 2:
        said = f"config.json's head_dim is {size}, and they take even ones up to {LARGEST_HEAD}"
        return Unfit(PlainReason.HEAD_SIZE, said)
    for name in LINEARS:
        out, into = config.linear_shape(name)
        for width in (out, into):
            if width % EVEN:
                said = f"{name} is {into} x {out}, and {width} does not divide by {EVEN}"
                return Unfit(PlainReason.WIDTH, said)
    missing = triton_trouble()
    return None if missing is None else Unfit(PlainReason.TRITON, f"triton cannot be used: {missing}")


def triton_trouble() -> str | None:
    """Why triton compiles and loads nothing here, if so: it is imported, and builds its launcher."""
    try:
        runtime: Any = importlib.import_module("triton.runtime")
        runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


REMEDIES = {
    PlainReason.TRITON: "use the agent's image as it is built, which has triton, a C compiler and Python's headers",
    PlainReason.HEAD_SIZE: "serve a model with other heads",
    PlainReason.WIDTH: "serve a model of other widths",
}


def refusal(found: Unfit, device: torch.device) -> EngineConfigError:
    """Where `kernelFallback` is not allowed."""
    return EngineConfigError(
        f"engine.kernelFallback is Forbidden, and kernels for {device} cannot compute here: {found.said}; "
        f"{REMEDIES[found.reason]}, or set engine.kernelFallback to Allowed: torch's plain operators, which are slower"
    )
