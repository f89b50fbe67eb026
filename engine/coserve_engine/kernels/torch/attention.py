"""Attention by its definition: one row of each of many sequences at once, over gathered pages, and tile by tile for the
rest (`Attention` with the products of `reference_forward`).
"""

from __future__ import annotations

import math

import torch

GATHERED_BYTES = 512 << 20
"""Of the keys, or values, that are gathered at once in the dtype for sums; one row's may be more."""


def hidden_keys(positions: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Which of so many first keys of its sequence a row does not see: bool [n, 1, 1, keys] for positions [n]."""
    key, row = torch.arange(keys, device=positions.device), positions.view(-1, 1, 1, 1)
    return key > row if window is None else (key > row) | (key <= row - window)


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    page: int,
    hidden: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One row of each of n sequences: q [n, H, D] -> o [n, H, D], computed in `dtype`, in parts where GATHERED_BYTES
    are not enough for all.

    Args:
        k, v: a layer's pools [KVH, positions, D].
        table: [n, pages], null pages where a sequence has fewer.
        hidden: `hidden_keys` of all the table's.
    """
    n, heads, size = q.shape
    most = max(1, GATHERED_BYTES // (k.shape[0] * table.shape[1] * page * size * dtype.itemsize))
    if n > most:
        parts = [slice(first, first + most) for first in range(0, n, most)]
        return torch.cat([attend_rows(q[rows], k, v, table[rows], page, hidden[rows], dtype) for rows in parts])

    def gathered(pool: torch.Tensor) -> torch.Tensor:
        """[n, KVH, pages * page, D]."""
        rows = pool.view(pool.shape[0], -1, page * size).index_select(1, table.flatten())
        return rows.view(pool.shape[0], n, -1, size).transpose(0, 1).to(dtype)

    folded = q.view(n, k.shape[0], -1, size).to(dtype)
    scores = (folded @ gathered(k).transpose(-1, -2)).mul_(1.0 / math.sqrt(size))
    scores.masked_fill_(hidden, float("-inf"))
    return (torch.softmax(scores, -1) @ gathered(v)).reshape(n, heads, size)
