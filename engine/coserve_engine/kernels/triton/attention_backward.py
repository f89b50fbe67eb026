"""Derivative of attention for the tiles of a unit, by two launches: of queries, then of keys and values.

Probabilities are rebuilt from the log-sum-exp (Dao et al., FlashAttention, 2022). A program of the second launch owns
keys of one tile and head: it reads what is in their accumulators, adds what the unit's query tiles give, last to first,
and writes them. How units cut a pass then changes no order of a sum, and nothing is added by atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from coserve_engine.kernels.triton.attention_tables import PassTables
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover


@dataclass(frozen=True, slots=True)
class UnitTiles:
    """Tiles [first, end) of a pass; the first is tile `index` of its sequence."""

    first: int
    end: int
    index: int


@triton.jit
def _descend(
    q,  # [M, WIDTH]
    do,  # [M, WIDTH]
    lse,  # [M], base 2
    delta,  # [M], sum of do * o
    at,  # [M], positions
    dq,  # [M, WIDTH], so far
    k_ptr,  # [places, D], of one head
    v_ptr,
    pages_ptr,  # of the sequence
    start,  # of BLOCK_N keys
    stop,
    written,  # keys that there are
    OWN: tl.constexpr,  # whether these are the rows' own tile
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What keys of the steps [start, stop) add to dq."""
    n = tl.arange(0, BLOCK_N)
    page = page_of(pages_ptr, start, BLOCK_N, PAGE)
    for step in tl.range(start, stop, num_stages=1 if OWN else None):
        place = places_of(page, step, BLOCK_N, PAGE)
        page = page_of(pages_ptr, tl.minimum(step + 1, stop - 1), BLOCK_N, PAGE)  # ahead: no load waits for a load
        key = step * BLOCK_N + n
        live = key < written
        k = load_rows(k_ptr, place, live, D, WIDTH, not OWN)
        v = load_rows(v_ptr, place, live, D, WIDTH, not OWN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * 1.4426950408889634)
        p = tl.exp2(s - lse[:, None])
        if OWN:
            p = tl.where(key[None, :] <= at[:, None], p, 0.0)
        if WINDOW > 0:
            p = tl.where(key[None, :] > at[:, None] - WINDOW, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * SCALE
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["first_tile", "places"], do_not_specialize_on_alignment=["tiles_ptr", "pages_ptr"])
def _queries(
    q_ptr,  # [R, HEADS, D], R rows of the unit
    do_ptr,  # [R, HEADS, D]
    k_ptr,  # [KVH, places, D]
    v_ptr,
    o_ptr,  # [rows of the pass, HEADS, D]
    lse_ptr,  # [rows of the pass, HEADS] float32, natural
    delta_ptr,  # [R, HEADS] float32, written: sum of do * o
    dq_ptr,  # [R, HEADS, D], written
    tiles_ptr,  # [N, 6] int64: `PassTables`
    pages_ptr,  # [P] int64
    first_tile,
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
    origin = tl.load(tiles_ptr + first_tile * 6)
    entry = tiles_ptr + (first_tile + tl.num_programs(0) - 1 - tl.program_id(0)) * 6  # most keys first
    kv_head = tl.program_id(1)
    row = tl.load(entry)
    rows = (tl.load(entry + 1) - row).to(tl.int32)
    last = tl.load(entry + 2).to(tl.int32)
    pages_ptr += tl.load(entry + 3)
    folded = tl.program_id(2) * BLOCK_M
    if folded >= rows * GROUP:
        return
    m = folded + tl.arange(0, BLOCK_M)
    r = m // GROUP
    live = r < rows
    at = last * TILE + r
    head = kv_head * GROUP + m % GROUP
    kept = (row + r) * HEADS + head
    place = kept - origin * HEADS
    q = load_rows(q_ptr, place, live, D, WIDTH, False)
    do = load_rows(do_ptr, place, live, D, WIDTH, False)
    o = load_rows(o_ptr, kept, live, D, WIDTH, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, mask=live)
    lse = tl.load(lse_ptr + kept, mask=live, other=0.0) * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    k_ptr += kv_head.to(tl.int64) * places * D
    v_ptr += kv_head.to(tl.int64) * places * D
    STEPS: tl.constexpr = TILE // BLOCK_N
    begin = 0
    if REACH > 0:
        begin = tl.maximum(last + 1 - REACH, 0) * STEPS
    own = last * STEPS
    for phase in tl.static_range(2):
        start, stop = (begin, own) if phase == 0 else (own, own + STEPS)
        dq = _descend(
            q, do, lse, delta, at, dq, k_ptr, v_ptr, pages_ptr, start, stop, last * TILE + rows,
            phase == 1, D, WIDTH, PAGE, WINDOW, SCALE, BLOCK_N,
        )  # fmt: skip
    store_rows(dq_ptr, place, live, dq, D, WIDTH)


@triton.jit(
    do_not_specialize=["first_key", "first_tile", "end_tile", "pass_rows", "places"],
    do_not_specialize_on_alignment=["tiles_ptr", "pages_ptr"],
)
def _keys(
    q_ptr,  # [R, HEADS, D], R rows of the unit
    do_ptr,  # [R, HEADS, D]
    k_ptr,  # [KVH, places, D]
    v_ptr,
    lse_ptr,  # [pass_rows, HEADS] float32, natural
    delta_ptr,  # [R, HEADS] float32
    dkv_ptr,  # [2, KVH, pass_rows, D] float32, added to
    tiles_ptr,  # [N, 6] int64: `PassTables`
    pages_ptr,  # [P] int64
    first_key,  # the first tile whose keys the unit sees
    first_tile,
    end_tile,
    pass_rows,
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
    STEPS: tl.constexpr = TILE // BLOCK_N
    mine = first_key + tl.program_id(0) // STEPS
    part = tl.program_id(0) % STEPS
    kv_head = tl.program_id(1).to(tl.int64)
    entry = tiles_ptr + mine * 6
    lo = tl.maximum(first_tile, mine)
    hi = tl.minimum(end_tile, tl.load(entry + 4).to(tl.int32))
    if REACH > 0:
        hi = tl.minimum(hi, mine + REACH)
    if lo >= hi:
        return
    row = tl.load(entry)
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    written = row + n < tl.load(entry + 1)
    step = tl.load(entry + 2).to(tl.int32) * STEPS + part
    place = places_of(page_of(pages_ptr + tl.load(entry + 3), step, BLOCK_N, PAGE), step, BLOCK_N, PAGE)
    k = load_rows(k_ptr + kv_head * places * D, place, written, D, WIDTH, False)
    v = load_rows(v_ptr + kv_head * places * D, place, written, D, WIDTH, False)
    of_k = kv_head * pass_rows + row + n
    of_v = of_k + (HEADS // GROUP) * pass_rows.to(tl.int64)
    dk = load_rows(dkv_ptr, of_k, written, D, WIDTH, False)
    dv = load_rows(dkv_ptr, of_v, written, D, WIDTH, False)
    first_row = tl.load(tiles_ptr + first_tile * 6)
    rows = (tl.load(entry + 5) - row).to(tl.int32)  # of the sequence, from this tile on
    BLOCKS: tl.constexpr = (TILE * GROUP + BLOCK_M - 1) // BLOCK_M
    for block in tl.range(0, (hi - lo) * BLOCKS):
        ahead = (hi - 1 - block // BLOCKS - mine) * TILE  # of this tile's first row
        m = (block % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
        r = m // GROUP
        live = (r < rows - ahead) & (m < TILE * GROUP)
        kept = (row + ahead) * HEADS + kv_head * GROUP
        begin = kept - first_row * HEADS
        at = r * HEADS + m % GROUP
        q = load_rows(q_ptr + begin * D, at, live, D, WIDTH, False)
        do = load_rows(do_ptr + begin * D, at, live, D, WIDTH, False)
        lse = tl.load(lse_ptr + kept + at, mask=live, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + begin + at, mask=live, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (SCALE * 1.4426950408889634)
        seen = (n[:, None] <= (ahead + r)[None, :]) & live[None, :]
        if WINDOW > 0:
            seen = seen & (n[:, None] > (ahead + r)[None, :] - WINDOW)
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :]) * SCALE
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dkv_ptr, of_k, written, dk, D, WIDTH)
    store_rows(dkv_ptr, of_v, written, dv, D, WIDTH)


QUERIES = {
    (64, True): Blocks(128, 64, 8, 2),
    (128, True): Blocks(128, 64, 8, 2),
    (256, True): Blocks(32, 64, 8, 2),
    (64, False): Blocks(128, 64, 8, 3),
    (128, False): Blocks(64, 64, 8, 3),
    (256, False): Blocks(64, 32, 8, 2),
}
KEYS = {
    (64, True): Blocks(64, 64, 8, 2),
    (128, True): Blocks(64, 64, 8, 2),
    (256, True): Blocks(32, 32, 8, 2),
    (64, False): Blocks(64, 32, 8, 2),
    (128, False): Blocks(64, 64, 8, 2),
    (256, False): Blocks(32, 32, 8, 2),
}
"""Both by padded head size, and whether the device is of compute capability 9.0 or above."""


@cache
def _launches(of: Heads) -> tuple[tuple[Kernel, int, Constants], tuple[Kernel, int, Constants]]:
    """Of queries and of keys: the kernel, how many programs a tile has, and constants."""
    constants, folded, shape = of.constants(), of.tile * of.group, (max(64, of.width), of.hopper)
    queries, keys = QUERIES[shape], KEYS[shape]
    q_sizes, k_sizes = queries.sizes(folded, of.tile), keys.sizes(folded, of.tile)
    return (
        (queries.kernel(_queries), cover(folded, q_sizes["BLOCK_M"]), Constants(**constants, **q_sizes)),
        (keys.kernel(_keys), of.tile // k_sizes["BLOCK_N"], Constants(**constants, **k_sizes)),
    )


def backward(
    q: torch.Tensor,
    do: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dkv: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: PassTables,
    unit: UnitTiles,
    of: Heads,
) -> torch.Tensor:
    """dq [R, heads, D], in q's dtype, of a unit of a pass; units of a pass come last tile first.

    Args:
        q, do: [R, heads, D] of the unit's rows, in one piece: encoded queries, and the gradient of what attention gave.
        o, lse: [rows, heads, D] and float32 [rows, heads] of all the pass's rows, as forward gave them.
        dkv: [2, KVH, rows, D] float32 of all the pass's encoded keys and values; the unit's share is added.
        k, v: a layer's pools [KVH, places, D].
        tables: of the pass.
    """
    dq = torch.empty_like(q)
    delta = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    (kernel, programs, constants), of_keys = _launches(of)
    count = unit.end - unit.first
    arguments = (q, do, k, v, o, lse, delta, dq, *tables, unit.first, k.shape[1])
    kernel.launch((count, of.kv_heads, programs), constants, *arguments)
    kernel, owners, constants = of_keys
    before = min(unit.index, of.reach - 1) if of.reach else unit.index
    numbers = (unit.first - before, unit.first, unit.end, dkv.shape[2], k.shape[1])
    owners *= before + count
    kernel.launch((owners, of.kv_heads), constants, q, do, k, v, lse, delta, dkv, *tables, *numbers)
    return dq
