"""Between a layer's linears and attention: heads are normalised and rotated, keys and values go to their pages.

A program has the heads of one row, both halves of each by itself: what rotary embedding mixes then lies in one thread.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Constants, Kernel, cover, power_of_two

ELEMENTS = 2048
"""Of a program."""


@triton.jit
def _angles(rope_ptr, position, POSITIONS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of half a head: those of both halves are alike, but for the sign of the first's sine."""
    column = tl.arange(0, HALF)
    inside = column < SIZE // 2
    cos = tl.load(rope_ptr + position * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    at = rope_ptr + (POSITIONS + position) * SIZE + SIZE // 2
    sin = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _heads(part, HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Of block `part` of a row's heads: which they are, where the first halves lie in the row, and which there are."""
    head, column = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    mask = (head < HEADS)[:, None] & (column < SIZE // 2)[None, :]
    return head.to(tl.int64), head[:, None] * SIZE + column[None, :], mask


@triton.jit
def _halves(x_ptr, mask, SIZE: tl.constexpr):
    """Both halves of what `x_ptr` has the first half of, float32."""
    a = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    return a, tl.load(x_ptr + SIZE // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(y_ptr, a, b, mask, SIZE: tl.constexpr):
    tl.store(y_ptr, a.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + SIZE // 2, b.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights(norm_ptr, mask, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a norm's weight."""
    at = tl.broadcast_to(tl.arange(0, HALF)[None, :], mask.shape)
    return _halves(norm_ptr + at, mask, SIZE)


@triton.jit
def _encoded(
    x_ptr, mask, cos, sin, norm_ptr, NORMED: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr
):
    """Both halves of heads, normalised where NORMED, rotated."""
    a, b = _halves(x_ptr, mask, SIZE)
    if NORMED:
        weight_a, weight_b = _weights(norm_ptr, mask, SIZE, HALF)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / SIZE + EPS)[:, None]
        a, b = a * rstd * weight_a, b * rstd * weight_b
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _decoded(
    dy_ptr,
    x_ptr,
    mask,
    cos,
    sin,
    norm_ptr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Both halves of dx of `_encoded` for dy: the transpose of the rotation, then the norm's derivative."""
    dy_a, dy_b = _halves(dy_ptr, mask, SIZE)
    a, b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
    if NORMED:
        weight_a, weight_b = _weights(norm_ptr, mask, SIZE, HALF)
        x_a, x_b = _halves(x_ptr, mask, SIZE)
        rstd = tl.rsqrt(tl.sum(x_a * x_a + x_b * x_b, 1) / SIZE + EPS)[:, None]
        a, b = a * weight_a, b * weight_b
        share = (tl.sum(a * x_a + b * x_b, 1) / SIZE)[:, None] * (rstd * rstd)
        a, b = (a - x_a * share) * rstd, (b - x_b * share) * rstd
    return a, b


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _queries(
    q_ptr,  # [R, HEADS, SIZE], rows Q_STRIDE apart
    q_norm_ptr,  # [SIZE], read where Q_NORMED
    rope_ptr,  # [2, POSITIONS, SIZE]
    positions_ptr,  # [R], int64
    encoded_ptr,  # [R, HEADS, SIZE]
    Q_STRIDE: tl.constexpr,
    Q_NORMED: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,  # a power of two from SIZE / 2 on
    BLOCK: tl.constexpr,  # heads of a program
):
    row = tl.program_id(0).to(tl.int64)
    cos, sin = _angles(rope_ptr, tl.load(positions_ptr + row), POSITIONS, SIZE, HALF)
    _, at, mask = _heads(tl.program_id(1), HEADS, SIZE, HALF, BLOCK)
    a, b = _encoded(q_ptr + row * Q_STRIDE + at, mask, cos, sin, q_norm_ptr, Q_NORMED, EPS, SIZE, HALF)
    _store(encoded_ptr + row * (HEADS * SIZE) + at, a, b, mask, SIZE)


@triton.jit(do_not_specialize=["places"], do_not_specialize_on_alignment=["positions_ptr", "write_ptr"])
def _forward(
    q_ptr,  # [T, HEADS, SIZE], rows Q_STRIDE apart
    k_ptr,  # [T, KV_HEADS, SIZE], rows K_STRIDE apart
    v_ptr,  # likewise V_STRIDE
    q_norm_ptr,  # [SIZE], read where Q_NORMED
    k_norm_ptr,  # [SIZE], read where K_NORMED
    rope_ptr,  # [2, POSITIONS, SIZE]
    positions_ptr,  # [T], int64
    write_ptr,  # [T], int64
    encoded_ptr,  # [T, HEADS, SIZE]
    k_pool_ptr,  # [KV_HEADS, places, SIZE]
    v_pool_ptr,  # likewise
    places,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.cdiv(HEADS, BLOCK)
    cos, sin = _angles(rope_ptr, tl.load(positions_ptr + row), POSITIONS, SIZE, HALF)
    if part < parts:
        _, at, mask = _heads(part, HEADS, SIZE, HALF, BLOCK)
        a, b = _encoded(q_ptr + row * Q_STRIDE + at, mask, cos, sin, q_norm_ptr, Q_NORMED, EPS, SIZE, HALF)
        _store(encoded_ptr + row * (HEADS * SIZE) + at, a, b, mask, SIZE)
    else:
        head, kv_at, there = _heads(part - parts, KV_HEADS, SIZE, HALF, KV_BLOCK)
        v_a, v_b = _halves(v_ptr + row * V_STRIDE + kv_at, there, SIZE)
        k_a, k_b = _encoded(k_ptr + row * K_STRIDE + kv_at, there, cos, sin, k_norm_ptr, K_NORMED, EPS, SIZE, HALF)
        to = (head * places + tl.load(write_ptr + row))[:, None] * SIZE + tl.arange(0, HALF)[None, :]
        _store(k_pool_ptr + to, k_a, k_b, there, SIZE)
        _store(v_pool_ptr + to, v_a, v_b, there, SIZE)


@triton.jit(do_not_specialize=["pass_rows"], do_not_specialize_on_alignment=["positions_ptr"])
def _backward(
    dq_ptr,  # [R, HEADS, SIZE]
    dkv_ptr,  # [2, KV_HEADS, R, SIZE] of a pass's [2, KV_HEADS, pass_rows, SIZE]
    q_ptr,  # [R, HEADS, SIZE], rows Q_STRIDE apart, read where Q_NORMED
    k_ptr,  # [R, KV_HEADS, SIZE], rows K_STRIDE apart, read where K_NORMED
    q_norm_ptr,  # [SIZE], read where Q_NORMED
    k_norm_ptr,  # [SIZE], read where K_NORMED
    rope_ptr,  # [2, POSITIONS, SIZE]
    positions_ptr,  # [R], int64
    d_ptr,  # [R, HEADS + 2 * KV_HEADS, SIZE]
    pass_rows,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.cdiv(HEADS, BLOCK)
    cos, sin = _angles(rope_ptr, tl.load(positions_ptr + row), POSITIONS, SIZE, HALF)
    d_ptr += row * ((HEADS + 2 * KV_HEADS) * SIZE)
    if part < parts:
        _, at, mask = _heads(part, HEADS, SIZE, HALF, BLOCK)
        dq, q = dq_ptr + row * (HEADS * SIZE) + at, q_ptr + row * Q_STRIDE + at
        a, b = _decoded(dq, q, mask, cos, sin, q_norm_ptr, Q_NORMED, EPS, SIZE, HALF)
        _store(d_ptr + at, a, b, mask, SIZE)
    else:
        head, kv_at, there = _heads(part - parts, KV_HEADS, SIZE, HALF, KV_BLOCK)
        dk = dkv_ptr + (head * pass_rows + row)[:, None] * SIZE + tl.arange(0, HALF)[None, :]
        dv_a, dv_b = _halves(dk + pass_rows.to(tl.int64) * (KV_HEADS * SIZE), there, SIZE)
        k = k_ptr + row * K_STRIDE + kv_at
        dk_a, dk_b = _decoded(dk, k, there, cos, sin, k_norm_ptr, K_NORMED, EPS, SIZE, HALF)
        d_ptr += HEADS * SIZE
        _store(d_ptr + kv_at, dk_a, dk_b, there, SIZE)
        _store(d_ptr + KV_HEADS * SIZE + kv_at, dv_a, dv_b, there, SIZE)


FORWARD, QUERIES, BACKWARD = Kernel(_forward), Kernel(_queries), Kernel(_backward)


@cache
def _sizes(heads: int, size: int) -> tuple[int, int, int]:
    """HALF, BLOCK, and programs of a row."""
    half = power_of_two(size // 2)
    block = min(max(ELEMENTS // (2 * half), 1), power_of_two(heads))
    return half, block, cover(heads, block)


@cache
def _constants(
    strides: tuple[int, ...], normed: tuple[bool, ...], eps: float, heads: tuple[int, ...], size: int, positions: int
) -> Constants:
    """Of queries, or of queries and keys (and values)."""
    half, block, _ = _sizes(heads[0], size)
    named = {
        **dict(zip(("Q_STRIDE", "K_STRIDE", "V_STRIDE"), strides, strict=False)),
        **dict(zip(("Q_NORMED", "K_NORMED"), normed, strict=False)),
        **dict(zip(("HEADS", "KV_HEADS"), heads, strict=False)),
    }
    if len(heads) > 1:
        named["KV_BLOCK"] = _sizes(heads[1], size)[1]
    return Constants(**named, POSITIONS=positions, EPS=eps, SIZE=size, HALF=half, BLOCK=block)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rope: torch.Tensor,
    positions: torch.Tensor,
    write: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> torch.Tensor:
    """Queries as attention takes them, and keys and values in the cache, as `kernels.functional.encode_heads` defines
    them, computed in float32.

    Args:
        q: [T, heads, D], k, v: [T, KVH, D]; rows may be apart.
        q_norm, k_norm: [D], of the heads' RMSNorm where the model has one.
        rope: [2, positions, D] (`rope_table`).
        positions: [T] int64, rows of the table.
        write: [T] int64, places in the pools. Rows with the same place (padding) leave there what any of them wrote.
        k_pool, v_pool: [KVH, places, D], one layer's; written where `write` says, keys rotated.

    Returns:
        [T, heads, D] in one piece.
    """
    (rows, heads, size), kv_heads = q.shape, k.shape[1]
    strides, normed = (q.stride(0), k.stride(0), v.stride(0)), (q_norm is not None, k_norm is not None)
    encoded = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    FORWARD.launch(
        (rows, _sizes(heads, size)[2] + _sizes(kv_heads, size)[2]),
        _constants(strides, normed, eps, (heads, kv_heads), size, rope.shape[1]),
        *(q, k, v, q if q_norm is None else q_norm, k if k_norm is None else k_norm, rope, positions, write),
        *(encoded, k_pool, v_pool, k_pool.shape[1]),
    )
    return encoded


def queries(
    q: torch.Tensor, q_norm: torch.Tensor | None, eps: float, rope: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`forward` of queries [R, heads, D] alone, whose rows may be apart: the same bits again."""
    rows, heads, size = q.shape
    encoded = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    QUERIES.launch(
        (rows, _sizes(heads, size)[2]),
        _constants((q.stride(0),), (q_norm is not None,), eps, (heads,), size, rope.shape[1]),
        *(q, q if q_norm is None else q_norm, rope, positions, encoded),
    )
    return encoded


def backward(
    dq: torch.Tensor,
    dkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rope: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What queries, keys and values had before `forward` get of what encoded ones have got.

    Args:
        dq: [R, heads, D] in one piece, of encoded queries.
        dkv: [2, KVH, R, D], of encoded keys and of values: these rows of a pass's, read where they lie.
        q, k: [R, heads, D] and [R, KVH, D] before norm and rotation, rows may be apart; k where keys are normalised.
        q_norm, k_norm, eps, rope, positions: those of `forward`.

    Returns:
        dq [R, heads, D], dk and dv [R, KVH, D] in q's dtype: neighbouring columns of one [R, (heads + 2 * KVH) * D].
    """
    rows, heads, size = q.shape
    kv_heads = dkv.shape[1]
    if k_norm is not None and k is None:
        raise ValueError("the derivative of a norm needs what was normalised")
    before = q if k is None else k
    strides, normed = (q.stride(0), before.stride(0)), (q_norm is not None, k_norm is not None)
    d = torch.empty(rows, heads + 2 * kv_heads, size, dtype=q.dtype, device=q.device)
    BACKWARD.launch(
        (rows, _sizes(heads, size)[2] + _sizes(kv_heads, size)[2]),
        _constants(strides, normed, eps, (heads, kv_heads), size, rope.shape[1]),
        *(dq, dkv, q, before, q if q_norm is None else q_norm, before if k_norm is None else k_norm),
        *(rope, positions, d, dkv.stride(1) // size),
    )
    dq, dk, dv = torch.split(d, [heads, kv_heads, kv_heads], 1)
    return dq, dk, dv
