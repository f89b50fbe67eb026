"""LoRA of many adapters in two launches a group of linears, each adapter with a rank of its own.

Blocks are runs of rows of one adapter. Weights are found through tables of addresses on the device (`lora_tables`), a
slot an adapter, so that a captured graph serves whatever adapters stand in the slots when it is replayed. The sums of a
row go by columns alone: in which block it stands changes nothing (SGMV of Punica, Chen et al., 2024, with the split of
K fixed).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from coserve_engine.config import LINEARS
from coserve_engine.kernels.triton.dropout import column_keys, kept
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover
from coserve_engine.kernels.triton.lora_tables import FEW, MANY, LoraTables

SPLIT_COLUMNS, MOST_SPLITS = 1024, 8
"""A sum over K is split into parts of at least so many columns: few rows are to fill a GPU too."""
BLOCK_R, BLOCK_K = 16, 128
BLOCK_N = {FEW: 128, MANY: 64}
"""Of outputs, by the rows of a block."""


@triton.jit
def block_rows(blocks_ptr, order_ptr, rows_all, UNIT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of this program's block: the first of its rows in `low`, how many they are, each one's row of the batch, and the
    slot. A unit's rows are neighbours of one adapter, which asks for no table.
    """
    block = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    if UNIT:
        first = block * BLOCK_M
        count = tl.minimum(rows_all - first, BLOCK_M)
        row = first + m
        slot = block * 0
    else:
        first = tl.load(blocks_ptr + block * 4)
        count = tl.load(blocks_ptr + block * 4 + 1)
        slot = tl.load(blocks_ptr + block * 4 + 2)
        at = tl.load(blocks_ptr + block * 4 + 3)
        listed = tl.load(order_ptr + (-1 - at) + m, mask=(m < count) & (at < 0), other=0)
        row = tl.where(at < 0, listed, at + m)
    return first, count, row, slot


@triton.jit
def columns_of(slice, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """Where a linear's columns begin among those of its group, and how many they are."""
    begin = tl.where(slice == 0, 0, tl.where(slice == 1, W0, W0 + W1))
    width = tl.where(slice == 0, W0, tl.where(slice == 1, W1, W2))
    return tl.multiple_of(begin, 16), tl.multiple_of(width, 16)


@triton.jit
def part_of(part, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BLOCK: tl.constexpr):
    """Which linear of the group the part-th block of columns belongs to, and its first column there."""
    P0: tl.constexpr = (W0 + BLOCK - 1) // BLOCK
    P1: tl.constexpr = (W1 + BLOCK - 1) // BLOCK
    slice = (part >= P0).to(tl.int32) + (part >= P0 + P1).to(tl.int32)
    return slice, (part - tl.where(slice == 0, 0, tl.where(slice == 1, P0, P0 + P1))) * BLOCK


@triton.jit
def row_drop(slots_ptr, slot, row, live):
    """uint32 keys of rows, the threshold that keeps all where the slot drops nothing, and 1 / (1 - p)."""
    keys = tl.load(slots_ptr + slot * 4 + 1)
    threshold = tl.load(slots_ptr + slot * 4 + 2).to(tl.int32)
    inverse = tl.load(slots_ptr + slot * 4 + 3).to(tl.int32).to(tl.float32, bitcast=True)
    found = tl.load(keys.to(tl.pointer_type(tl.int32)) + row, mask=live & (keys != 0), other=0)
    return found.to(tl.uint32, bitcast=True), threshold, inverse


@triton.jit(do_not_specialize=["linear", "slots", "rows_all", "width", "key_row"])
def _shrink(
    x_ptr,  # [T, K], rows X_STRIDE apart; of BACK the derivatives of a group's outputs side by side
    entries_ptr,  # int64 [layers * LINEARS, slots, 4]
    slots_ptr,  # int64 [slots, 4]
    folds_ptr,  # int32 [layers * LINEARS]
    blocks_ptr,  # int64 [B, 4]
    order_ptr,  # int64 [listed rows]
    low_ptr,  # float32 [SPLITS, SLICES, rows_all, width]
    linear,  # the group's first in entries
    slots,
    rows_all,
    width,
    key_row,  # which key is that of row 0
    K: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BACK: tl.constexpr,  # by B instead of A^T
    DROP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice = tl.program_id(1) % SLICES
    r = (tl.program_id(1) // SLICES) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first, count, row, slot = block_rows(blocks_ptr, order_ptr, rows_all, UNIT, BLOCK_M)
    entry = entries_ptr + ((linear + slice) * slots + slot) * 4
    rank = tl.multiple_of(tl.load(entry + 2).to(tl.int32), 8)
    if (tl.program_id(1) // SLICES) * BLOCK_R >= rank:
        return
    if count == 0:
        return
    factor = tl.load(entry + (1 if BACK else 0)).to(tl.pointer_type(x_ptr.dtype.element_ty))
    factor = tl.multiple_of(factor, 16)
    scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
    m = tl.arange(0, BLOCK_M)
    live = m < count
    if BACK:
        begin, length = columns_of(slice, W0, W1, W2)
    else:
        begin = 0
        length = K
    if DROP:
        keys, threshold, inverse = row_drop(slots_ptr, slot, row + key_row, live)
        fold = tl.load(folds_ptr + linear + slice)
        scale *= inverse
    steps = (length + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    k = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = x_ptr + row[:, None] * X_STRIDE + begin
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in tl.range(0, steps):
        at = k + step * BLOCK_K
        inside = at < length
        x = tl.load(rows + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            x = tl.where(kept(keys[:, None], column_keys(at, fold)[None, :], threshold), x, 0.0)
        if BACK:
            w = tl.load(factor + at[:, None] * rank + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        else:
            w = tl.load(factor + r[:, None] * K + at[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            w = tl.trans(w)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    width = tl.multiple_of(width, 8)
    out = ((split * SLICES + slice) * rows_all + first + m)[:, None] * width + r[None, :]
    tl.store(low_ptr + out, acc * scale, mask=live[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["linear", "slots", "rows_all", "width"])
def _expand(
    low_ptr,  # float32 [SPLITS, SLICES, rows_all, width]
    entries_ptr,  # int64 [layers * LINEARS, slots, 4]
    blocks_ptr,  # int64 [B, 4]
    order_ptr,  # int64 [listed rows]
    y_ptr,  # [T, W0 + W1 + W2], rows Y_STRIDE apart: added to
    linear,
    slots,
    rows_all,
    width,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice, start = part_of(tl.program_id(1), W0, W1, W2, BLOCK_N)
    begin, out = columns_of(slice, W0, W1, W2)
    first, count, row, slot = block_rows(blocks_ptr, order_ptr, rows_all, UNIT, BLOCK_M)
    entry = entries_ptr + ((linear + slice) * slots + slot) * 4
    rank = tl.multiple_of(tl.load(entry + 2).to(tl.int32), 8)
    if rank == 0:
        return
    if count == 0:
        return
    width = tl.multiple_of(width, 8)
    b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
    m = tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    live = m < count
    where = row[:, None] * Y_STRIDE + begin + n[None, :]
    mask = live[:, None] & (n < out)[None, :]
    y = tl.load(y_ptr + where, mask=mask, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for from_r in tl.range(0, rank, BLOCK_R):
        r = from_r + tl.arange(0, BLOCK_R)
        here = live[:, None] & (r < rank)[None, :]
        low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in tl.static_range(SPLITS):
            at = ((split * SLICES + slice) * rows_all + first + m)[:, None] * width + r[None, :]
            low += tl.load(low_ptr + at, mask=here, other=0.0)
        w = tl.load(b + n[:, None] * rank + r[None, :], mask=(n < out)[:, None] & (r < rank)[None, :], other=0.0)
        acc = tl.dot(low.to(w.dtype), tl.trans(w), acc, input_precision=PRECISION)
    tl.store(y_ptr + where, (y + acc).to(y_ptr.dtype.element_ty), mask=mask)


SHRINK = Kernel(_shrink)
EXPAND = {FEW: Kernel(_expand, warps=8, stages=2), MANY: Kernel(_expand, stages=2)}
"""By the rows of a block."""


def precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as it is."""
    return "ieee" if dtype is torch.float32 else "tf32"


def splits_of(columns: int) -> int:
    """Parts that a row's sum over so many columns is made in."""
    return min(MOST_SPLITS, max(1, columns // SPLIT_COLUMNS))


def widths(outs: Sequence[int]) -> dict[str, Any]:
    """Of up to three linears side by side."""
    return dict(zip(("W0", "W1", "W2"), (*outs, 0, 0, 0), strict=False))


def place(layer: int, group: Sequence[str]) -> int:
    """The group's first linear among those of all layers; its others follow."""
    return layer * len(LINEARS) + LINEARS.index(group[0])


@cache
def _shrinking(
    into: int, stride: int, back: tuple[int, ...], count: int, splits: int, drop: bool, unit: bool, block: int, how: str
) -> Constants:
    sizes = {"SLICES": count, "SPLITS": splits, "BLOCK_M": block, "BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K}
    flags = {"BACK": bool(back), "DROP": drop and not back, "UNIT": unit, "PRECISION": how}
    return Constants(K=into, X_STRIDE=stride, **widths(back), **sizes, **flags)


def shrink(
    x: torch.Tensor,
    tables: LoraTables,
    layer: int,
    group: Sequence[str],
    *,
    splits: int | None = None,
    back: tuple[int, ...] = (),
) -> torch.Tensor:
    """scale * (x A^T) of each linear of a group.

    Args:
        x: [T, in], whose rows may be apart; in, and the outs of linears, divide by 16. Inputs are dropped where the
            tables say so.
        splits: parts that each sum is made in, else `splits_of`.
        back: the outs of the group's linears, where x is the derivative of these side by side and is to be multiplied
            by each one's B.

    Returns:
        float32 [splits, len(group), tables.rows, tables.rank], to be summed over the first; unwritten where an adapter
        has a lesser rank.
    """
    rows, rank, count = tables.rows, tables.rank, len(group)
    splits = splits_of(x.shape[1]) if splits is None else splits
    low = torch.empty(splits, count, rows, rank, dtype=torch.float32, device=x.device)
    kind = (splits, tables.drops, tables.unit, tables.block_rows, precision(x.dtype))
    SHRINK.launch(
        (tables.programs, count * cover(rank, BLOCK_R), splits),
        _shrinking(x.shape[1], x.stride(0), back, count, *kind),
        *(x, tables.entries, tables.slots, tables.folds, tables.blocks, tables.order, low),
        *(place(layer, group), tables.entries.shape[1], rows, rank, tables.key_row),
    )
    return low


@cache
def _expanding(
    outs: tuple[int, ...], stride: int, splits: int, unit: bool, block: int, how: str
) -> tuple[int, Constants]:
    """Programs of a block of rows, and constants."""
    block_n = BLOCK_N[block]
    sizes = {"SLICES": len(outs), "SPLITS": splits, "BLOCK_M": block, "BLOCK_N": block_n, "BLOCK_R": BLOCK_R}
    constants = Constants(**widths(outs), Y_STRIDE=stride, **sizes, UNIT=unit, PRECISION=how)
    return sum(cover(out, block_n) for out in outs), constants


def expand(
    low: torch.Tensor, y: torch.Tensor, tables: LoraTables, layer: int, group: Sequence[str], outs: tuple[int, ...]
) -> None:
    """Add low B^T of each linear of a group, for `low` of `shrink`, to y [T, sum(outs)], where their outputs lie side
    by side; its rows may be apart.
    """
    kind = (tables.unit, tables.block_rows, precision(y.dtype))
    programs, constants = _expanding(outs, y.stride(0), low.shape[0], *kind)
    EXPAND[tables.block_rows].launch(
        (tables.programs, programs),
        constants,
        *(low, tables.entries, tables.blocks, tables.order, y),
        *(place(layer, group), tables.entries.shape[1], tables.rows, tables.rank),
    )
