"""What a model's work takes by bytes and operations alone: where the latency model begins, and what it says of work
that there was no time to measure.

Roofline's two rates (Williams et al., 2009) are measured on the model's own weights: bytes where few rows read a large
weight, operations where a tile of rows meets one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.device.timing import seconds_of
from coserve_engine.latency.fit import Prior
from coserve_engine.latency.work import ForwardWork, UnitWork
from coserve_engine.model.executor import Executor
from coserve_engine.tensors.weights import FrozenLinear

CALL_S = 3e-5
"""An attention call besides its keys and pairs."""
TRIES = 3
BYTES_BOUND, MOST_ROWS = 0.7, 4096
"""Share of the rows of a product from which on the ridge may lie above them; rows that are tried at most."""
LEAST_S = 1e-9
"""A clock that stands still measures nothing, and no rate is infinite."""
TYPICAL_FORWARD = ForwardWork(decode=8, prefill=64, finetune=64, calls=10, kv_rows=2560, pairs=40960).features()
TYPICAL_UNIT = UnitWork(False, 64, 1, 16384).features()
TYPICAL_HEAD = UnitWork(True, 64, 1, 0).features()


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does in a second with this model's weights."""

    bytes_per_s: float
    flops_per_s: float

    def ridge_rows(self, itemsize: int) -> float:
        """Rows with which a weight's operations take as long as its bytes."""
        return itemsize * self.flops_per_s / (2 * self.bytes_per_s)

    @classmethod
    def measured(cls, executor: Executor, clock: Callable[[], float]) -> Rates:
        """The best of TRIES with the head, which fits no cache, and with a layer's widest linear: by a tile of rows,
        and by twice as many as long as those may still take the time of the weight's bytes.
        """
        model, numerics, weights, itemsize = (
            executor.model,
            executor.numerics,
            executor.transformer.weights,
            executor.dtype.itemsize,
        )
        name = max(LINEARS, key=lambda n: _size(model, n))

        def best_s(linear: FrozenLinear, rows: int, width: int) -> float:
            x = torch.ones(rows, width, dtype=executor.dtype, device=executor.device)
            run = partial(linear.forward, x)
            return max(LEAST_S, min(seconds_of(executor.copies, clock, run) for _ in range(TRIES)))

        head_s = best_s(weights.head, numerics.row_multiple, model.hidden)
        bytes_per_s, rows = model.vocab_size * model.hidden * itemsize / head_s, numerics.tile
        while True:
            linear_s = best_s(weights.layers[0].linears[name], rows, model.linear_shape(name)[1])
            rates = cls(bytes_per_s, 2 * rows * _size(model, name) / linear_s)
            still = min(head_s, linear_s) <= LEAST_S
            if still or rates.ridge_rows(itemsize) < BYTES_BOUND * rows or rows >= MOST_ROWS:
                return rates
            rows *= 2


@dataclass(frozen=True, slots=True)
class Priors:
    """Of forwards, a layer's units and the head's."""

    forward: Prior
    unit: Prior
    head: Prior


def analytic(model: ModelConfig, rates: Rates, itemsize: int) -> Priors:
    """Every weight is read once; a row is two operations a weight, a pair four a channel of attention in forward and
    ten in backward, which computes the scores again; logits and their gradient are read or written six times.
    """
    layer, head = sum(_size(model, name) for name in LINEARS), model.vocab_size * model.hidden
    channels = model.heads * model.head_size
    read_s, flop_s = itemsize / rates.bytes_per_s, 1.0 / rates.flops_per_s
    row_s = 2 * layer * flop_s
    forward = (
        (model.layers * layer + head) * read_s,
        model.layers * row_s + 2 * head * flop_s,
        model.layers * row_s,
        model.layers * row_s,
        model.layers * CALL_S,
        1e3 * model.layers * 2 * model.kv_heads * model.head_size * read_s,
        1e5 * model.layers * 4 * channels * flop_s,
    )
    unit = (layer * read_s, row_s, CALL_S, 1e5 * 10 * channels * flop_s)
    head_unit = (head * read_s, 4 * head * flop_s + 6 * model.vocab_size * read_s, 0.0, 0.0)
    return Priors(Prior(forward, TYPICAL_FORWARD), Prior(unit, TYPICAL_UNIT), Prior(head_unit, TYPICAL_HEAD))


def _size(model: ModelConfig, name: str) -> int:
    out, into = model.linear_shape(name)
    return out * into
