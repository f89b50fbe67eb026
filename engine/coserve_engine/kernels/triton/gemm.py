"""Products with frozen weights of one configuration, whatever the number of rows: y = x W^T + b, and dx = dy W.

The library chooses a kernel by the shape of a product, and may split a sum over programs: a row's bits then depend on
its batch. Here a program makes a block of the result by itself, its sum in float32 over blocks of one size from the
first to the last, so that a row's bits are its own. Blocks of rows that meet the same block of a weight run side by
side and share it in the L2 cache (the grouped order of Triton's matrix multiplication tutorial).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Constants, Kernel, cover


@triton.jit(do_not_specialize=["rows"])
def _gemm(
    x_ptr,  # [rows, K], rows X_STRIDE apart
    w_ptr,  # [N, K]; where BACK [K, N]
    bias_ptr,  # [N], read where BIASED
    y_ptr,  # [rows, N]
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BACK: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that meet a block of the weight one after another
    PRECISION: tl.constexpr,
):
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // (GROUP * COLUMNS) * GROUP
    within = tl.program_id(0) % (GROUP * COLUMNS)
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    m = (first + within % size).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // size).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live, inside = m < rows, n < N
    x = x_ptr + m[:, None] * X_STRIDE + k[None, :]
    w = w_ptr + k.to(tl.int64)[:, None] * N + n[None, :] if BACK else w_ptr + n[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        of_x, of_w = live[:, None], inside[None, :] if BACK else inside[:, None]
        if K % BLOCK_K != 0:
            there = start + k < K
            of_x = of_x & there[None, :]
            of_w = of_w & (there[:, None] if BACK else there[None, :])
        left = tl.load(x, mask=of_x, other=0.0)
        right = tl.load(w, mask=of_w, other=0.0)
        acc = tl.dot(left, right if BACK else tl.trans(right), acc, input_precision=PRECISION)
        x += BLOCK_K
        w += BLOCK_K * N if BACK else BLOCK_K
    if BIASED:
        acc += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


class Configuration(NamedTuple):
    """How products in one dtype are computed."""

    kernel: Kernel
    sizes: dict[str, Any]


def _configuration(m: int, n: int, k: int, warps: int, stages: int, precision: str) -> Configuration:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PRECISION": precision}
    return Configuration(Kernel(_gemm, warps, stages), sizes)


@cache
def _constants(
    width: int, length: int, stride: int, back: bool, biased: bool, dtype: torch.dtype, hopper: bool
) -> Constants:
    sizes = CONFIGURATIONS[dtype, hopper].sizes
    return Constants(N=width, K=length, X_STRIDE=stride, BACK=back, BIASED=biased, **sizes)


CONFIGURATIONS = {
    (torch.bfloat16, True): _configuration(128, 128, 64, 8, 3, "tf32"),
    (torch.bfloat16, False): _configuration(128, 128, 64, 8, 4, "tf32"),
    (torch.float32, True): _configuration(64, 64, 32, 4, 3, "ieee"),
    (torch.float32, False): _configuration(64, 64, 32, 4, 3, "ieee"),
}
"""By dtype, and whether the device is of compute capability 9.0 or above. Not by the shape of a weight: its columns
could then be computed in two ways, alone and beside others.
"""


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    hopper: bool,
    back: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x weight^T + bias, summed in float32 and rounded once.

    Args:
        x: [R, in], whose rows may be apart.
        weight: [out, in] in one piece; in and out divide by 16.
        bias: [out].
        hopper: whether the device is of compute capability 9.0 or above.
        back: x is [R, out], and is multiplied by the weight as it is: what is returned is [R, in].
        dtype: of what is returned, else x's.
    """
    rows, length = x.shape
    width = weight.shape[1 if back else 0]
    y = torch.empty(rows, width, dtype=dtype or x.dtype, device=x.device)
    kernel, sizes = CONFIGURATIONS[x.dtype, hopper]
    grid = (cover(rows, sizes["BLOCK_M"]) * cover(width, sizes["BLOCK_N"]),)
    constants = _constants(width, length, x.stride(0), back, bias is not None, x.dtype, hopper)
    kernel.launch(grid, constants, x, weight, x if bias is None else bias, y, rows)
    return y


class GemmLinear:
    """A frozen weight [out, in] with a bias [out], or none, by `product`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, hopper: bool) -> None:
        self.weight, self.bias, self.hopper = weight.contiguous(), bias, hopper

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias, hopper=self.hopper)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        return product(dy, self.weight, hopper=self.hopper, back=True)
