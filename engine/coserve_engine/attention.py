"""Causal attention over one absolute tile of one sequence, forward and backward.

A call sees at most `tile` query rows of one tile and the keys of all tiles up to its end: the shape of the products
depends on the tile's index alone, so decode, prefill chunks and finetuning windows give the same bits. Keys after a
row's position are masked; their storage must be finite. Forward keeps the log-sum-exp of a row, from which backward
rebuilds the probabilities (Dao et al., FlashAttention, 2022); dK and dV are added to buffers tile by tile, last tile
first (FlexLLM's token-level backward).
"""

from __future__ import annotations

import math

import torch


def causal_bias(tile: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[tile, tile] with -inf above the diagonal: what is added to the scores of a tile's own keys."""
    return torch.full((tile, tile), float("-inf"), dtype=dtype, device=device).triu(1)


def _fold(rows: torch.Tensor, kv_heads: int, padded: int) -> torch.Tensor:
    """[R, H, D] -> [KVH, G * padded, D], rows padded with zeros."""
    count, heads, size = rows.shape
    if padded != count:
        rows = torch.cat([rows, rows.new_zeros(padded - count, heads, size)])
    group = heads // kv_heads
    return rows.view(padded, kv_heads, group, size).permute(1, 2, 0, 3).reshape(kv_heads, group * padded, size)


def _unfold(folded: torch.Tensor, heads: int, padded: int, count: int) -> torch.Tensor:
    """Inverse of `_fold`: [KVH, G * padded, D] -> [count, H, D]."""
    kv_heads, _, size = folded.shape
    group = heads // kv_heads
    return folded.view(kv_heads, group, padded, size).permute(2, 0, 1, 3).reshape(padded, heads, size)[:count]


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, first: int, count: int, padded: int) -> torch.Tensor:
    """Masked, scaled scores [KVH, G * padded, L].

    Padded rows repeat the mask of the last row, so that none is empty.
    """
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(1.0 / math.sqrt(q.shape[-1]))
    tile = bias.shape[0]
    rows = bias[first : first + count]
    if padded != count:
        rows = torch.cat([rows, rows[-1:].expand(padded - count, tile)])
    kv_heads, _, length = scores.shape
    scores.view(kv_heads, -1, padded, length)[..., length - tile :].add_(rows)
    return scores


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, first: int, padded: int, *, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of rows `first`.. of a tile.

    Args:
        q: [R, H, D] rotated queries of consecutive positions of one tile.
        k, v: [KVH, L, D] with L a multiple of the tile, up to the tile's end.
        bias: `causal_bias`.
        first: index of the first row within its tile.
        padded: rows of the products, R or more.

    Returns:
        o [R, H, D] and, if wanted, lse [R, H].
    """
    count, heads, _ = q.shape
    kv_heads = k.shape[0]
    scores = _scores(_fold(q, kv_heads, padded), k, bias, first, count, padded)
    lse = None
    if want_lse:
        lse = _unfold(torch.logsumexp(scores, -1, keepdim=True), heads, padded, count).squeeze(-1)
    out = torch.bmm(torch.softmax(scores, -1), v)
    return _unfold(out, heads, padded, count), lse


def attend_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor:
    """Backward of `attend` for the first R rows of a tile.

    Args:
        do, q, o: [R, H, D]; lse: [R, H]; k, v: [KVH, L, D] as in forward.
        dk, dv: [KVH, >= real keys, D]; the contribution of these rows is added in place.

    Returns:
        dq [R, H, D].
    """
    count, heads, size = q.shape
    kv_heads, length, _ = k.shape
    q_rows, do_rows = _fold(q, kv_heads, count), _fold(do, kv_heads, count)
    lse_rows = _fold(lse.unsqueeze(-1), kv_heads, count)
    delta = _fold((do * o).sum(-1, keepdim=True), kv_heads, count)
    p = _scores(q_rows, k, bias, 0, count, count).sub_(lse_rows).exp_()
    ds = torch.bmm(do_rows, v.transpose(1, 2)).sub_(delta).mul_(p).mul_(1.0 / math.sqrt(size))
    real = min(length, dk.shape[1])
    dv[:, :real] += torch.bmm(p.transpose(1, 2), do_rows)[:, :real]
    dk[:, :real] += torch.bmm(ds.transpose(1, 2), q_rows)[:, :real]
    return _unfold(torch.bmm(ds, k), heads, count, count)
