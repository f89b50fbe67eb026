"""Which table computes: by device and dtype alone, so that an engine's bits do not depend on the moment."""

from __future__ import annotations

from typing import Any

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.cpu.table import CpuKernels
from coserve_engine.kernels.protocol import Kernels
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.dtypes import Dtypes


def select(
    config: ModelConfig, numerics: Numerics, dtypes: Dtypes, rope: torch.Tensor, *, backward: bool
) -> Kernels[Any, Any]:
    """The table for `dtypes` on the device of `rope` (`rope_table`, in the dtype of sums, for the longest sequence).

    Args:
        backward: whether there will be any.
    """
    if rope.device.type == "cpu" and dtypes.compute is dtypes.accumulate:
        return CpuKernels.create(config, numerics, rope, backward=backward)
    return TorchKernels.create(config, numerics, dtypes, rope)
