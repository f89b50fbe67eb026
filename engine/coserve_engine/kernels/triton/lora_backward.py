"""What a unit's rows add to the gradients of an adapter's factors and to dx, a group of linears at once.

Gradients are float32 and summed tile by tile, last tile first, each program by itself: how units cut a pass changes no
bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.dropout import column_keys, kept
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover
from coserve_engine.kernels.triton.lora import (
    BLOCK_N,
    BLOCK_R,
    columns_of,
    part_of,
    place,
    precision,
    row_drop,
    shrink,
    widths,
)
from coserve_engine.kernels.triton.lora_tables import MANY, PassTables
from coserve_engine.tensors.lora import AB

BLOCK_W = 128


@triton.jit(
    do_not_specialize=["offset0", "offset1", "offset2", "linear", "first", "end", "first_row", "rows_all", "rank"]
)
def _gradient(
    wide_ptr,  # [R, ...], rows STRIDE apart: x for A, or the derivatives of a group's outputs side by side for B
    narrow_ptr,  # float32 [SLICES, R, rank]: what the other factor made of the other one
    grads_ptr,  # float32, all gradients of the adapter: added to
    slots_ptr,  # int64 [1, 4]
    folds_ptr,  # int32 [layers * LINEARS]
    tiles_ptr,  # int64 [tiles of the pass, TILE_STRIDE]: first row in the pass, rows
    offset0,  # where a linear's gradient [rank, W] of A or [W, rank] of B begins; below 0: it has none
    offset1,
    offset2,
    linear,
    first,  # tiles [first, end)
    end,
    first_row,  # of the unit in the pass
    rows_all,  # R
    rank,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE_STRIDE: tl.constexpr,
    OF_A: tl.constexpr,
    DROP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice, start = part_of(tl.program_id(0), W0, W1, W2, BLOCK_W)
    begin, width = columns_of(slice, W0, W1, W2)
    offset = tl.where(slice == 0, offset0, tl.where(slice == 1, offset1, offset2))
    if offset < 0:
        return
    rank = tl.multiple_of(rank, 8)
    w = start + tl.arange(0, BLOCK_W)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, TILE)
    inside_w, inside_r = w < width, r < rank
    grads = grads_ptr + tl.multiple_of(offset.to(tl.int64), 8)
    if OF_A:
        wide = wide_ptr + w
        at = r.to(tl.int64)[:, None] * width + w[None, :]
        inside = inside_r[:, None] & inside_w[None, :]
        acc = tl.trans(tl.load(grads + at, mask=inside, other=0.0))
    else:
        wide = wide_ptr + begin + w
        at = w.to(tl.int64)[:, None] * rank + r[None, :]
        inside = inside_w[:, None] & inside_r[None, :]
        acc = tl.load(grads + at, mask=inside, other=0.0)
    narrow = narrow_ptr + slice.to(tl.int64) * rows_all * rank + r
    if DROP:
        columns = column_keys(w, tl.load(folds_ptr + linear + slice))
    row = tl.load(tiles_ptr + (end - 1) * TILE_STRIDE)
    count = tl.load(tiles_ptr + (end - 1) * TILE_STRIDE + 1)
    for step in tl.range(0, end - first):
        here, live = row - first_row + t, t < count
        left = tl.load(wide + here[:, None] * STRIDE, mask=live[:, None] & inside_w[None, :], other=0.0)
        right = tl.load(narrow + here[:, None] * rank, mask=live[:, None] & inside_r[None, :], other=0.0)
        if DROP:
            keys, threshold, inverse = row_drop(slots_ptr, 0, row + t, live)
            left = tl.where(kept(keys[:, None], columns[None, :], threshold), left, 0.0)
            right *= inverse
        ahead = tl.maximum(end - 2 - step, first) * TILE_STRIDE  # read before it is needed: loads can go ahead
        row = tl.load(tiles_ptr + ahead)
        count = tl.load(tiles_ptr + ahead + 1)
        acc = tl.dot(tl.trans(left), right.to(left.dtype), acc, input_precision=PRECISION)
    if OF_A:
        acc = tl.trans(acc)
    tl.store(grads + at, acc, mask=inside)


@triton.jit(do_not_specialize=["linear", "rows_all", "width", "key_row"])
def _into_dx(
    dlow_ptr,  # float32 [SLICES, R, width]
    entries_ptr,  # int64 [layers * LINEARS, 4]
    slots_ptr,  # int64 [1, 4]
    folds_ptr,  # int32 [layers * LINEARS]
    dx_ptr,  # [R, K], rows DX_STRIDE apart: added to
    linear,
    rows_all,  # R
    width,
    key_row,  # of the unit in the pass
    K: tl.constexpr,
    DX_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, inside = row < rows_all, n < K
    width = tl.multiple_of(width, 8)
    where = dx_ptr + row[:, None] * DX_STRIDE + n[None, :]
    mask = live[:, None] & inside[None, :]
    total = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        keys, threshold, inverse = row_drop(slots_ptr, 0, row + key_row, live)
    for slice in tl.range(0, SLICES):
        entry = entries_ptr + (linear + slice) * 4
        rank = tl.load(entry + 2).to(tl.int32)
        a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(dx_ptr.dtype.element_ty)), 16)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for from_r in tl.range(0, rank, BLOCK_R):
            r = from_r + tl.arange(0, BLOCK_R)
            at = (slice * rows_all + row)[:, None] * width + r[None, :]
            dlow = tl.load(dlow_ptr + at, mask=live[:, None] & (r < rank)[None, :], other=0.0)
            w = tl.load(a + r[:, None] * K + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(dlow.to(w.dtype), w, acc, input_precision=PRECISION)
        if DROP:
            columns = column_keys(n, tl.load(folds_ptr + linear + slice))
            acc = tl.where(kept(keys[:, None], columns[None, :], threshold), acc * inverse, 0.0)
        total += acc
    tl.store(where, total.to(dx_ptr.dtype.element_ty), mask=mask)


GRADIENT, INTO_DX = Kernel(_gradient, stages=2), Kernel(_into_dx, stages=2)


@cache
def _of_factor(parts: tuple[int, ...], stride: int, of_a: bool, drop: bool, tile_stride: int, how: str) -> Constants:
    sizes = {"TILE": MANY, "BLOCK_W": BLOCK_W, "BLOCK_R": BLOCK_R, "TILE_STRIDE": tile_stride}
    return Constants(**widths(parts), STRIDE=stride, **sizes, OF_A=of_a, DROP=of_a and drop, PRECISION=how)


@cache
def _of_input(into: int, stride: int, count: int, drop: bool, how: str) -> Constants:
    sizes = {"SLICES": count, "BLOCK_M": MANY, "BLOCK_N": BLOCK_N[MANY], "BLOCK_R": BLOCK_R}
    return Constants(K=into, DX_STRIDE=stride, **sizes, DROP=drop, PRECISION=how)


def lora_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    dx: torch.Tensor | None,
    flat: torch.Tensor,
    grads: Mapping[str, AB],
    of: PassTables,
    layer: int,
    group: Sequence[str],
    outs: tuple[int, ...],
    tiles: tuple[int, int],
    rows: slice,
) -> None:
    """What tiles [first, end) of a pass add to the gradients of a group's factors, and to dx.

    Args:
        dy: [R, out], the derivatives of the group's outputs side by side; x: [R, in], their inputs. Rows may be apart.
        dx: [R, in], added to; None where it is not needed.
        flat: float32, all gradients of the adapter: added to. `grads`: the layer's, views of it, by linear.
        outs: of each linear of the group.
        rows: of the pass, those of the tiles.
    """
    if not of.adapter.names.intersection(group):
        return
    tables, rank, into = of.rows(rows.start, rows.stop), of.adapter.rank, x.shape[1]
    low = shrink(x, tables, layer, group, splits=1)
    dlow = shrink(dy, tables, layer, group, splits=1, back=outs)
    for of_a, wide, narrow in ((True, x, dlow), (False, dy, low)):
        parts = (into,) * len(group) if of_a else outs
        begins = [_offset(flat, grads.get(name), 0 if of_a else 1) for name in group]
        GRADIENT.launch(
            (sum(cover(part, BLOCK_W) for part in parts), cover(rank, BLOCK_R)),
            _of_factor(parts, wide.stride(0), of_a, of.drops, of.tiles.stride(0), precision(wide.dtype)),
            *(wide, narrow, flat, of.slot, of.folds, of.tiles, *begins, *[-1] * (3 - len(begins))),
            *(place(layer, group), *tiles, rows.start, tables.rows, rank),
        )
    if dx is not None:
        INTO_DX.launch(
            (tables.programs, cover(into, BLOCK_N[MANY])),
            _of_input(into, dx.stride(0), len(group), of.drops, precision(dx.dtype)),
            *(dlow, of.adapter.entries, of.slot, of.folds, dx, place(layer, group), tables.rows, rank, rows.start),
        )


def _offset(flat: torch.Tensor, grads: AB | None, which: int) -> int:
    """Where the gradient of A or B begins in `flat`; -1 where there is none."""
    return -1 if grads is None else int(grads[which].storage_offset() - flat.storage_offset())
