"""Tokens drawn from the likeliest of a row without a sort.

Of a row p one launch, parallel over the vocabulary, keeps each block's largest value and sum. By another a program a
row searches the values at which top_k and top_p end and inverts the sum of what they keep in the order of token ids,
block by block, then in one block. A search goes over the bits of floats, which stand in the order of the numbers as
none is negative (radix select, as in Alabi et al., 2012): between what the maxima of blocks reach by themselves, which
all values together reach at the latest there, and the row's maximum, four bits at a time until one value is left.
Blocks that hold nothing so large are not read. All sums are made in an order that the vocabulary alone decides.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.sampling import BoundChoices
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover, power_of_two

BLOCK, TOGETHER = 512, 8
"""Tokens of a block, and blocks that a program of the first launch takes."""


@triton.jit
def _summary(
    p_ptr,  # float32 [D, VOCAB]
    most_ptr,  # float32 [D, BLOCKS]: -1 where no value of a block is a number
    sums_ptr,  # float64 [D, BLOCKS]
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p = tl.load(p_ptr + row * VOCAB + at, mask=at < VOCAB, other=-1.0)
    p = tl.where(p >= 0, p, -1.0)
    tl.store(most_ptr + row * BLOCKS + block, tl.max(p, 1), mask=block < BLOCKS)
    sums = tl.sum(tl.maximum(p, 0.0).to(tl.float64), 1)
    tl.store(sums_ptr + row * BLOCKS + block, sums, mask=block < BLOCKS)


@triton.jit
def _next(most, least, block, WIDTH: tl.constexpr):
    """The first block behind `block` in which some bits are not less than `least`; WIDTH where there is none."""
    at = tl.arange(0, WIDTH)
    return tl.min(tl.where((most >= least) & (at > block), at, WIDTH))


@triton.jit
def _load(p_ptr, block, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """p of a block [BLOCK], -1 behind the vocabulary."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(p_ptr + at, mask=at < VOCAB, other=-1.0)


@triton.jit
def _crossing(
    p_ptr, most, least, BY_COUNT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """Where the sum of p [VOCAB] in descending order, or the count, comes up to `least`: the bits of the value there,
    and the sum and the count of those above it, float64. `most` [WIDTH]: bits of the blocks' maxima.
    """
    digit = tl.arange(0, 16)
    size = tl.where(most >= 0, 1.0 if BY_COUNT else most.to(tl.float32, bitcast=True), 0.0).to(tl.float64)
    low = tl.full([], 0, tl.int32)
    for level in tl.range(0, 5):  # of numbers up to one: the highest 20 of 30 bits
        tried = low | (digit << (26 - 4 * level))
        reached = tl.sum(tl.where(most[None, :] >= tried[:, None], size[None, :], 0.0), 1) >= least
        low = tl.max(tl.where(reached, tried, low))
    top = tl.max(most)
    low = tl.maximum(tl.minimum(low, top), 0)
    shift = tl.full([], 0, tl.int32)
    while (top - low) >> shift > 15:
        shift += 1
    digits = tl.full([], 16, tl.int32)
    above = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    searched = top >= 0
    while searched:
        sums = tl.zeros([16, BLOCK], tl.float64)
        counts = tl.zeros([16, BLOCK], tl.int32)
        block = _next(most, low, -1, WIDTH)
        while block < WIDTH:
            p = _load(p_ptr, block, VOCAB, BLOCK)
            one = ((p.to(tl.int32, bitcast=True) - low) >> shift)[None, :] == digit[:, None]
            sums += tl.where(one, p.to(tl.float64)[None, :], 0.0)
            counts += one.to(tl.int32)
            block = _next(most, low, block, WIDTH)
        # of each digit: what has it, and what stands above it
        some = tl.where(digit < digits, tl.sum(sums, 1), 0.0)
        many = tl.where(digit < digits, tl.sum(counts, 1), 0).to(tl.float64)
        higher = digit[None, :] > digit[:, None]
        some_above = above + tl.sum(tl.where(higher, some[None, :], 0.0), 1)
        many_above = count + tl.sum(tl.where(higher, many[None, :], 0.0), 1)
        reached = many_above + many if BY_COUNT else some_above + some
        best = tl.max(tl.where((reached >= least) & (many > 0), digit, -1))
        if best < 0:  # rounding: the last that there is
            best = tl.min(tl.where(many > 0, digit, 15))
        above = tl.sum(tl.where(digit == best, some_above, 0.0))
        count = tl.sum(tl.where(digit == best, many_above, 0.0))
        low += best << shift
        if tl.sum(tl.where(digit == best, many, 0.0)) <= 1:  # it is its own sum
            low = tl.sum(tl.where(digit == best, some, 0.0)).to(tl.float32).to(tl.int32, bitcast=True)
            searched = False
        searched = searched & (shift > 0)
        digits = 1 << tl.minimum(shift, 4)
        shift = tl.maximum(shift - 4, 0)
    return low, above, count


@triton.jit
def _kept(p_ptr, block, last, passed, equal, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """p of a block [BLOCK], float64, zero where it is not kept, and how many of them have the last bits that are;
    `passed` stand before the block.
    """
    p = _load(p_ptr, block, VOCAB, BLOCK)
    bits = p.to(tl.int32, bitcast=True)
    same = (bits == last).to(tl.int32)
    kept = (bits > last) | ((same > 0) & (passed + tl.cumsum(same, 0) <= equal))
    return tl.where(kept & (p >= 0), p, 0.0).to(tl.float64), tl.sum(same)


@triton.jit(do_not_specialize_on_alignment=["u_ptr", "top_k_ptr", "top_p_ptr"])
def _draw(
    p_ptr,  # float32 [D, VOCAB]
    most_ptr,  # float32 [D, BLOCKS]
    sums_ptr,  # float64 [D, BLOCKS]
    u_ptr,  # float64 [D]
    top_k_ptr,  # float64 [D]
    top_p_ptr,  # float64 [D]
    tokens_ptr,  # int64 [D]
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr += row * VOCAB
    u, top_k, top_p = tl.load(u_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    at = tl.arange(0, WIDTH)
    most = tl.load(most_ptr + row * BLOCKS + at, mask=at < BLOCKS, other=-1.0).to(tl.int32, bitcast=True)
    sums = tl.load(sums_ptr + row * BLOCKS + at, mask=at < BLOCKS, other=0.0)
    # the bits of the last value that is kept, how many of those that have them are, and what is kept of each block,
    # before which `passed` have them
    last = tl.full([], 0, tl.int32)
    equal = tl.full([], VOCAB, tl.float64)
    passed = tl.zeros([WIDTH], tl.int32)
    if (top_k < VOCAB) | (top_p < 1):
        mass = tl.sum(sums)
        if top_k < VOCAB:
            last, above, count = _crossing(p_ptr, most, top_k, True, VOCAB, BLOCK, WIDTH)
            equal = top_k - count
            mass = above + equal * last.to(tl.float32, bitcast=True).to(tl.float64)
        if top_p < 1:
            least = top_p * mass
            value, above, count = _crossing(p_ptr, most, least, False, VOCAB, BLOCK, WIDTH)
            size = tl.maximum(value.to(tl.float32, bitcast=True).to(tl.float64), 1e-300)
            needed = tl.maximum(tl.ceil((least - above) / size), 1.0)
            if count + needed < top_k:
                last = value
                equal = needed
        sums = tl.zeros([WIDTH], tl.float64)
        before = tl.full([], 0, tl.int32)
        block = _next(most, last, -1, WIDTH)
        while block < WIDTH:
            kept, same = _kept(p_ptr, block, last, before, equal, VOCAB, BLOCK)
            sums = tl.where(at == block, tl.sum(kept), sums)
            passed = tl.where(at == block, before, passed)
            before += same
            block = _next(most, last, block, WIDTH)
    target = u * tl.sum(sums)
    block = tl.min(tl.where((sums > 0) & (tl.cumsum(sums, 0) > target), at, WIDTH))
    if block == WIDTH:  # rounding, here and below: the last that there is
        block = tl.maximum(tl.max(tl.where(sums > 0, at, -1)), 0)
    before = tl.sum(tl.where(at == block, passed, 0))
    kept, _ = _kept(p_ptr, block, last, before, equal, VOCAB, BLOCK)
    target -= tl.sum(tl.where(at < block, sums, 0.0))
    place = tl.arange(0, BLOCK)
    found = tl.min(tl.where((kept > 0) & (tl.cumsum(kept, 0) > target), place, BLOCK))
    if found == BLOCK:
        found = tl.maximum(tl.max(tl.where(kept > 0, place, -1)), 0)
    tl.store(tokens_ptr + row, (block * BLOCK + found).to(tl.int64))


SUMMARY, DRAW = Kernel(_summary), Kernel(_draw, warps=16)


@cache
def _constants(vocab: int) -> tuple[Constants, Constants]:
    """Of both launches."""
    blocks = cover(vocab, BLOCK)
    sizes = {"VOCAB": vocab, "BLOCK": BLOCK, "BLOCKS": blocks}
    return Constants(**sizes, TOGETHER=TOGETHER), Constants(**sizes, WIDTH=max(16, power_of_two(blocks)))


def draw(p: torch.Tensor, choices: BoundChoices, u: torch.Tensor) -> torch.Tensor:
    """`kernels.sampling.Draw`: what sorting p [D, vocab], float32 and in one piece, would choose, but for sums that
    lie within rounding of a boundary.
    """
    rows, vocab = p.shape
    blocks = cover(vocab, BLOCK)
    most = torch.empty(rows, blocks, dtype=torch.float32, device=p.device)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=p.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=p.device)
    summary, drawing = _constants(vocab)
    SUMMARY.launch((rows, cover(blocks, TOGETHER)), summary, p, most, sums)
    DRAW.launch((rows,), drawing, p, most, sums, u, choices.column("top_k"), choices.column("top_p"), tokens)
    return tokens
