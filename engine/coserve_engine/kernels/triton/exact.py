"""The table in which a row's bits depend on its sequence alone, and a job's gradients on its samples alone.

What `table` leaves to the library or computes by one of several configurations is computed by one here: products with
frozen weights by `gemm`, LoRA in blocks of one size, attention of decode rows as prompts' rows, the head tile by tile.
All else sums within a row, or tile by tile in one order, there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.kernels.triton.bound import Tables
from coserve_engine.kernels.triton.gemm import GemmLinear, product
from coserve_engine.kernels.triton.table import TritonKernels
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.weights import FrozenLinear


@dataclass(frozen=True)
class ExactKernels(TritonKernels):
    """`TritonKernels` whose configurations depend on the model alone."""

    exact: bool = True

    @classmethod
    def create(cls, config: ModelConfig, numerics: Numerics, dtypes: Dtypes, rope: torch.Tensor) -> Self:
        made = super().create(config, numerics, dtypes, rope)
        return replace(made, tables=Tables(config.layers, alike=True))

    def _promise(self) -> Iterator[str]:
        yield "products with frozen weights, LoRA and attention by one configuration each, whatever the rows"

    @property
    def graphs(self) -> None:
        """Forwards of decode rows are not captured."""
        return None

    @property
    def mixed(self) -> None:
        """Nor are others."""
        return None

    @property
    def head_rows(self) -> int:
        """Tile by tile: the loss is summed so."""
        return 0

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        return GemmLinear(weight, bias, hopper=self.heads[0].hopper)

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        assert isinstance(head, GemmLinear)  # its own
        return product(x, head.weight, hopper=head.hopper, dtype=self.dtypes.accumulate)
