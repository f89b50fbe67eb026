"""Products with frozen weights: y = x W^T + b, and dx = dy W, never dW.

The packed form lays a weight out once for oneDNN, which a processor's caches like better than repacking it in every
product: for few rows it is about 1.4 times as fast as BLAS, and up to twice for wide layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from coserve_engine.kernels.plain import PlainLinear
from coserve_engine.numerics import Numerics
from coserve_engine.tensors.weights import FrozenLinear

PACKED_ROWS = 256
"""Rows that oneDNN lays a weight out for. A layout for few rows gives other bits for more."""
PROBED_ROWS = (4, 8, 12, 16, 20, 28, 32, 48, 64, 96, 128, 192, 256, 320)
LEAST_PROBED = 64
"""Rows that are tried of the widest weights too: those of a tile."""
CHECK_FLOPS = 1e11
"""What the check of one product may compute beyond LEAST_PROBED rows: some seconds of a slow core. Not a time: what is
chosen must not depend on the moment.
"""


def by_inputs(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] of no fewer outputs than inputs, on a CPU, laid out with the outputs of one input side by
    side; any other as it is. BLAS reads it in order then: 1.1 to 1.2 times as fast in forward, no slower in backward.
    Widths that are no multiples of 8 stay: a row's bits would depend on its place.
    """
    out, into = weight.shape
    fits = out >= into and out % 8 == into % 8 == 0 and weight.device.type == "cpu"
    return weight.t().contiguous().t() if fits else weight


class PackedLinear:
    """By oneDNN, float32 on a CPU. Holds two layouts of the weight, one where `backward` is not wanted."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backward: bool = True) -> None:
        self._forward, self._bias = _pack(weight), bias
        self._backward = _pack(weight.t().contiguous()) if backward else None

    @staticmethod
    def available() -> bool:
        """Whether this torch has the operators."""
        return hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self._forward, self._bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        if self._backward is None:
            raise ValueError("this linear was packed for serving only")
        return _product(dy, self._backward, None)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    return packed


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def probed_rows(weights: int) -> int:
    """The most rows that the check of a product with so many weights tries."""
    spent = 0
    for index, rows in enumerate(PROBED_ROWS):
        spent += rows
        if rows > LEAST_PROBED and 2.0 * weights * (spent + rows) > CHECK_FLOPS:
            return PROBED_ROWS[index - 1]
    return PROBED_ROWS[-1]


def differing_rows(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, numerics: Numerics) -> list[int]:
    """Row counts among PROBED_ROWS, up to R, for which the last rows of x [R, in], copied elsewhere and turned by one
    place, give other bits than among all of them: none where a row's bits depend on the row alone.
    """
    whole = product(x)
    counts = (rows for rows in PROBED_ROWS if rows % numerics.row_multiple == 0 and rows <= x.shape[0])
    return [rows for rows in counts if not torch.equal(product(x[-rows:].roll(1, 0)), whole[-rows:].roll(1, 0))]


class LinearChoice:
    """Chooses how each shape of weight is computed: the fast way where it keeps a row's bits, else the plain one."""

    def __init__(self, device: torch.device, dtype: torch.dtype, numerics: Numerics, *, backward: bool) -> None:
        self._numerics, self._backward = numerics, backward
        self._reason = ""
        if device.type != "cpu" or dtype is not torch.float32:
            self._reason = f"{dtype} on {device.type}".removeprefix("torch.")
        elif not PackedLinear.available():
            self._reason = "this torch has no oneDNN"
        self._odd: dict[tuple[int, int], list[int]] = {}
        """Row counts that the packed form fails, for each shape."""

    def make(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        """The linear of weight [out, in] and bias [out]."""
        out, into = weight.shape
        if self._reason:
            self._odd[out, into] = []
            return PlainLinear(by_inputs(weight), bias)
        packed = PackedLinear(weight, bias, backward=self._backward)
        if (out, into) not in self._odd:
            draw, rows = torch.Generator().manual_seed(0), probed_rows(out * into)
            odd = differing_rows(packed.forward, torch.randn(rows, into, generator=draw), self._numerics)
            if self._backward:
                dy = torch.randn(rows, out, generator=draw)
                odd += differing_rows(packed.backward, dy, self._numerics)
            self._odd[out, into] = odd
        return PlainLinear(by_inputs(weight), bias) if self._odd[out, into] else packed

    def notes(self) -> Iterator[str]:
        """Lines for the log: what was chosen and why."""
        if self._reason:
            yield f"linears by BLAS ({self._reason})"
        for (out, into), odd in sorted(self._odd.items()):
            why = f"BLAS (packed, rows differ for {sorted(set(odd))} rows)" if odd else "oneDNN, packed"
            if not self._reason:
                yield f"linear {out} x {into} by {why}"
            if (tried := probed_rows(out * into)) < PROBED_ROWS[-1]:
                yield f"linear {out} x {into} is large: whether rows keep their bits is tried up to {tried} rows"
