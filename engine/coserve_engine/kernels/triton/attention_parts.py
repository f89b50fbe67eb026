"""What attention's kernels share: what a launch is told of a layer's heads, and how a program finds keys and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Kernel, kernel_of, power_of_two


class Blocks(NamedTuple):
    """What a program takes at once: `m` folded rows, `n` keys; and its warps and stages."""

    m: int
    n: int
    warps: int
    stages: int

    def kernel(self, function: Any) -> Kernel:
        """A function that takes so much."""
        return kernel_of(function, self.warps, self.stages)

    def sizes(self, rows: int, tile: int) -> dict[str, int]:
        """Constants of a kernel, where there are so many folded rows at most."""
        return {"BLOCK_M": max(16, min(self.m, power_of_two(rows))), "BLOCK_N": min(self.n, tile)}


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention of a layer.

    Args:
        heads, kv_heads, size: of queries, of keys and values, and the elements of one.
        window: keys that a row sees, its own included; None: all.
        hopper: whether the device is of compute capability 9.0 or above.
    """

    heads: int
    kv_heads: int
    size: int
    tile: int
    page: int
    window: int | None
    hopper: bool

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """`size`, padded to what a program can hold."""
        return max(16, 1 << (self.size - 1).bit_length())

    @property
    def reach(self) -> int:
        """Tiles that any row of a tile may see; 0: all."""
        return 0 if self.window is None else 1 - -(self.window - 1) // self.tile

    def constants(self) -> dict[str, int | float]:
        """Of every kernel; the size of a pool is none, since on a GPU it is what a start finds free."""
        return {
            "HEADS": self.heads,
            "GROUP": self.group,
            "D": self.size,
            "WIDTH": self.width,
            "TILE": self.tile,
            "PAGE": self.page,
            "WINDOW": self.window or 0,
            "REACH": self.reach,
            "SCALE": 1.0 / math.sqrt(self.size),
        }


@triton.jit
def page_of(pages_ptr, step, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Number of the page that holds a sequence's keys [step * BLOCK, ...), or of each key's where pages are smaller."""
    if PAGE >= BLOCK:
        page = tl.load(pages_ptr + step * BLOCK // PAGE)
    else:
        page = tl.load(pages_ptr + (step * BLOCK + tl.arange(0, BLOCK)) // PAGE)
    return page


@triton.jit
def places_of(page, step, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Where in the pool these keys lie: [BLOCK] int64."""
    return page * PAGE + (step * BLOCK) % PAGE + tl.arange(0, BLOCK) % PAGE


@triton.jit
def load_rows(ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows [N] of a matrix [..., D] -> [N, WIDTH]; zeros behind D, and where one is not `live` unless WHOLE."""
    d = tl.arange(0, WIDTH)
    at = ptr + rows[:, None] * D + d[None, :]
    if WHOLE and D == WIDTH:
        found = tl.load(at)
    elif WHOLE:
        found = tl.load(at, mask=(d < D)[None, :], other=0.0)
    elif D == WIDTH:
        found = tl.load(at, mask=live[:, None], other=0.0)
    else:
        found = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    return found


@triton.jit
def store_rows(ptr, rows, live, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse: values [N, WIDTH] to the rows that are `live`."""
    d = tl.arange(0, WIDTH)
    at = ptr + rows[:, None] * D + d[None, :]
    mask = live[:, None]
    if D != WIDTH:
        mask = mask & (d < D)[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)
