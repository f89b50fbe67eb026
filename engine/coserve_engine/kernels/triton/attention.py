"""Attention over the paged cache: one launch for the tiles of prompts and windows, and two for all decode rows.

A program takes rows of one tile and the heads that share a key-value head, folded into one matrix, through the keys up
to the tile's end, first to last, and keeps a maximum and a sum as it goes (Dao et al., FlashAttention, 2022). A decode
row's keys are split over programs (FlashDecoding, 2023) in pieces that its own context decides, so that its bits do not
depend on its neighbours.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.attention_parts import (
    Blocks,
    Heads,
    load_rows,
    page_of,
    places_of,
    store_rows,
)
from coserve_engine.kernels.triton.attention_tables import CallTables
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover

LEAST_TILES, FEW_SPLITS, MANY_SPLITS, LONG_TILES = (tl.constexpr(n) for n in (2, 16, 32, 256))
"""Tiles of a split at least; splits at most, of a context of up to LONG_TILES and of a longer one."""


@triton.jit
def _absorb(
    q,  # [M, WIDTH]
    at,  # [M], their positions
    best,  # [M], the highest score so far; base 2, as all scores here
    total,  # [M], sum of the probabilities' numerators so far
    acc,  # [M, WIDTH], of them times values
    k_ptr,  # [places, D], of one head
    v_ptr,
    pages_ptr,  # of the sequence
    start,  # of BLOCK_N keys
    stop,
    written,  # keys that there are
    MASKED: tl.constexpr,  # whether rows' own tile is among these
    AHEAD: tl.constexpr,  # whether to load ahead
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What keys of the steps [start, stop) add. In the rows' own tile some are not seen, and what lies behind the last
    that was written may be anything.
    """
    n = tl.arange(0, BLOCK_N)
    page = page_of(pages_ptr, start, BLOCK_N, PAGE)
    for step in tl.range(start, stop, num_stages=None if AHEAD else 1):
        place = places_of(page, step, BLOCK_N, PAGE)
        page = page_of(pages_ptr, tl.minimum(step + 1, stop - 1), BLOCK_N, PAGE)  # ahead: no load waits for a load
        key = step * BLOCK_N + n
        live = key < written
        k = load_rows(k_ptr, place, live, D, WIDTH, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * 1.4426950408889634)
        if MASKED:
            s = tl.where(key[None, :] <= at[:, None], s, float("-inf"))
        if WINDOW > 0:
            s = tl.where(key[None, :] > at[:, None] - WINDOW, s, float("-inf"))
        higher = tl.maximum(best, tl.max(s, 1))
        base = higher
        if WINDOW > 0:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, place, live, D, WIDTH, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = higher
    return best, total, acc


@triton.jit(do_not_specialize=["places"], do_not_specialize_on_alignment=["calls_ptr", "pages_ptr"])
def _forward(
    q_ptr,  # [T, HEADS, D]
    k_ptr,  # [KVH, places, D]
    v_ptr,
    o_ptr,  # [T, HEADS, D]
    lse_ptr,  # [T, HEADS] float32, natural
    calls_ptr,  # [C, 5] int64: `CallTables`
    pages_ptr,  # [P] int64
    places,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a row sees; 0: all
    REACH: tl.constexpr,  # tiles that any row of a tile sees; 0: all
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    entry = calls_ptr + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    row = tl.load(entry)
    rows = tl.load(entry + 1).to(tl.int32)
    first = tl.load(entry + 2).to(tl.int32)
    last = tl.load(entry + 3).to(tl.int32) - 1
    pages_ptr += tl.load(entry + 4)
    folded = tl.program_id(2) * BLOCK_M
    if folded >= rows * GROUP:
        return
    m = folded + tl.arange(0, BLOCK_M)
    r = m // GROUP
    live = r < rows
    at = last * TILE + first + r
    place = (row + r) * HEADS + kv_head * GROUP + m % GROUP
    q = load_rows(q_ptr, place, live, D, WIDTH, False)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    k_ptr += kv_head.to(tl.int64) * places * D
    v_ptr += kv_head.to(tl.int64) * places * D
    written = last * TILE + first + rows
    STEPS: tl.constexpr = TILE // BLOCK_N
    begin = 0
    if REACH > 0:
        begin = tl.maximum(last + 1 - REACH, 0) * STEPS
    own = last * STEPS
    for phase in tl.static_range(2):
        start, stop = (begin, own) if phase == 0 else (own, own + STEPS)
        best, total, acc = _absorb(
            q, at, best, total, acc, k_ptr, v_ptr, pages_ptr, start, stop, written,
            phase == 1, phase == 0, D, WIDTH, PAGE, WINDOW, SCALE, BLOCK_N,
        )  # fmt: skip
    store_rows(o_ptr, place, live, acc / total[:, None], D, WIDTH)
    tl.store(lse_ptr + place, (best + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit
def _splits(position, TILE: tl.constexpr, REACH: tl.constexpr):
    """Of a decode row: its first tile, how many there are, and tiles of a split, a power of two."""
    tiles = position // TILE + 1
    begin = tl.maximum(tiles - REACH, 0) if REACH > 0 else tiles * 0
    count = tiles - begin
    most = tl.where(count > LONG_TILES, MANY_SPLITS, FEW_SPLITS)
    length = count * 0 + LEAST_TILES
    while length * most < count:
        length *= 2
    return begin, count, length


@triton.jit(
    do_not_specialize=["width", "most", "places"], do_not_specialize_on_alignment=["positions_ptr", "pages_ptr"]
)
def _decode(
    q_ptr,  # [n, HEADS, D]
    k_ptr,  # [KVH, places, D]
    v_ptr,
    part_ptr,  # [n, HEADS, most, D] float32: o of each split's keys alone
    part_lse_ptr,  # [n, HEADS, most] float32, base 2
    positions_ptr,  # [n] int64
    pages_ptr,  # [n, width] int64
    width,
    most,
    places,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions_ptr + row).to(tl.int32)
    begin, count, length = _splits(position, TILE, REACH)
    if split * length >= count:
        return
    STEPS: tl.constexpr = TILE // BLOCK_N
    start = (begin + split * length) * STEPS
    stop = tl.minimum(start + length * STEPS, position // BLOCK_N + 1)
    g = tl.arange(0, BLOCK_M)
    live = g < GROUP
    place = row * HEADS + kv_head * GROUP + g
    q = load_rows(q_ptr, place, live, D, WIDTH, False)
    at = position + g * 0
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    k_ptr += kv_head.to(tl.int64) * places * D
    v_ptr += kv_head.to(tl.int64) * places * D
    pages_ptr += row * width
    best, total, acc = _absorb(
        q, at, best, total, acc, k_ptr, v_ptr, pages_ptr, start, stop, position + 1,
        True, True, D, WIDTH, PAGE, WINDOW, SCALE, BLOCK_N,
    )  # fmt: skip
    part = place * most + split
    if WINDOW > 0:  # which may end within the first tile, or before it
        seen = total > 0
        best, total = tl.where(seen, best, float("-inf")), tl.where(seen, total, 1.0)
    store_rows(part_ptr, part, live, acc / total[:, None], D, WIDTH)
    tl.store(part_lse_ptr + part, best + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["positions_ptr"])
def _combine(
    part_ptr,  # [n, HEADS, most, D] float32
    part_lse_ptr,  # [n, HEADS, most] float32, base 2
    o_ptr,  # [n, HEADS, D]
    positions_ptr,  # [n] int64
    most,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    _, count, length = _splits(tl.load(positions_ptr + row).to(tl.int32), TILE, REACH)
    place = row * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    live = split < tl.cdiv(count, length)
    lse = tl.load(part_lse_ptr + place * most + split, mask=live, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = load_rows(part_ptr, place * most + split, live, D, WIDTH, False)
    d = tl.arange(0, WIDTH)
    o = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(o_ptr + place * D + d, o.to(o_ptr.dtype.element_ty), mask=d < D)


FORWARD = {
    (64, True): Blocks(128, 64, 8, 3),
    (128, True): Blocks(128, 64, 8, 3),
    (256, True): Blocks(64, 32, 8, 3),
    (64, False): Blocks(128, 64, 8, 4),
    (128, False): Blocks(64, 64, 8, 4),
    (256, False): Blocks(64, 32, 8, 4),
}
"""By padded head size, and whether the device is of compute capability 9.0 or above."""
DECODE = {64: Blocks(128, 64, 4, 4), 128: Blocks(128, 32, 4, 4), 256: Blocks(128, 32, 4, 4)}
"""By padded head size; a program takes all heads of a group."""
COMBINE = Kernel(_combine, warps=4)


def most_splits(tiles: int) -> int:
    """Of contexts of up to so many tiles, the most that one is split into."""
    if tiles <= LONG_TILES.value:
        return int(min(FEW_SPLITS.value, cover(tiles, LEAST_TILES.value)))
    return int(min(MANY_SPLITS.value, cover(tiles, LONG_TILES.value // FEW_SPLITS.value)))


@cache
def _forwarding(of: Heads) -> tuple[Kernel, int, Constants]:
    """The kernel, programs of a tile, and constants."""
    blocks = FORWARD[max(64, of.width), of.hopper]
    sizes = blocks.sizes(of.tile * of.group, of.tile)
    constants = Constants(**of.constants(), **sizes)
    return blocks.kernel(_forward), cover(of.tile * of.group, sizes["BLOCK_M"]), constants


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: CallTables,
    o: torch.Tensor,
    lse: torch.Tensor,
    of: Heads,
) -> None:
    """Attention of the rows of all calls, by one launch.

    Args:
        q: [T, heads, D], encoded, in one piece.
        k, v: a layer's pools [KVH, places, D].
        o, lse: [T, heads, D] and float32 [T, heads], written at the calls' rows: the log-sum-exp is natural.
    """
    kernel, programs, constants = _forwarding(of)
    kernel.launch((tables.calls.shape[0], of.kv_heads, programs), constants, q, k, v, o, lse, *tables, k.shape[1])


@cache
def _decoding(of: Heads) -> tuple[Kernel, Constants, Constants]:
    """The kernel of the first launch, and the constants of both."""
    blocks, constants = DECODE[max(64, of.width)], of.constants()
    shared = {name: constants[name] for name in ("HEADS", "D", "WIDTH", "TILE", "REACH")}
    sizes = blocks.sizes(of.group, of.tile)
    return blocks.kernel(_decode), Constants(**constants, **sizes), Constants(**shared, SPLITS=MANY_SPLITS.value)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    o: torch.Tensor,
    of: Heads,
) -> None:
    """Attention of the first n rows, one of each of n sequences, by two launches.

    Args:
        q, o: [T, heads, D] in one piece; of o the first n rows are written.
        k, v: a layer's pools [KVH, places, D].
        positions: [T] int64, in the sequences.
        pages: [n, most] int64: `kernels.bound.put_table`.
    """
    n, width = pages.shape
    most = most_splits(width * of.page // of.tile)
    part = torch.empty(n, of.heads, most, of.size, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(n, of.heads, most, dtype=torch.float32, device=q.device)
    kernel, decoding, combining = _decoding(of)
    arguments = (q, k, v, part, part_lse, positions, pages, width, most, k.shape[1])
    kernel.launch((n, of.kv_heads, most), decoding, *arguments)
    COMBINE.launch((n, of.heads), combining, part, part_lse, o, positions, most)
