"""Which table computes: by device, model, dtype and mode alone, so that bits do not depend on the moment."""

from __future__ import annotations

from typing import Any

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.kernels.cpu.table import CpuKernels
from coserve_engine.kernels.fallback import has_kernels, refusal, unfit
from coserve_engine.kernels.protocol import Kernels
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.dtypes import Dtypes


def select(
    config: ModelConfig,
    numerics: Numerics,
    dtypes: Dtypes,
    rope: torch.Tensor,
    *,
    backward: bool,
    exact: bool = False,
    fallback: bool = False,
) -> Kernels[Any, Any]:
    """The table for `dtypes` on the device of `rope` (`rope_table`, in the dtype of sums, for the longest sequence).

    Args:
        backward: whether there will be any.
        exact: whether a row's bits must depend on its sequence alone.
        fallback: whether plain operators may compute where kernels for the device cannot.

    Raises:
        EngineConfigError: a row's bits must, and no table that computes this so promises that; or plain operators may
            not, and would.
    """
    if rope.device.type == "cpu" and dtypes.compute is dtypes.accumulate:
        return CpuKernels.create(config, numerics, rope, backward=backward)
    if has_kernels(rope.device, dtypes):
        found = unfit(config)
        if found is None:
            from coserve_engine.kernels.triton.exact import ExactKernels  # noqa: PLC0415  (for Linux alone)
            from coserve_engine.kernels.triton.table import TritonKernels  # noqa: PLC0415

            return (ExactKernels if exact else TritonKernels).create(config, numerics, dtypes, rope)
        if not fallback:
            raise refusal(found, rope.device)
    if exact:
        raise EngineConfigError(_refusal(dtypes, rope.device.type))
    return TorchKernels.create(config, numerics, dtypes, rope)


def _refusal(dtypes: Dtypes, device: str) -> str:
    """Why nothing is promised there, and the remedy."""
    dtype = str(dtypes.compute).removeprefix("torch.")
    mode = "engine.numericsMode is Exact"
    if device == "cpu":
        return f"{mode}, which {dtype} on a CPU is not; set engine.dtype to float32, or engine.numericsMode to Fast"
    return (
        f"{mode}, and the kernels for that take no model like this in {dtype} on {device} (widths of linears that "
        "divide by 16, heads of an even size up to 256); set engine.numericsMode to Fast"
    )
