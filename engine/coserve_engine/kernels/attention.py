"""Causal attention over one absolute tile of one sequence, forward and backward.

A call sees at most `tile` query rows of one tile and the keys of whole tiles up to its end, from the first tile that a
sliding window reaches: the shape of the products depends on the tile's index alone, so decode, prefill chunks and
finetuning windows give the same bits. Keys that a row does not see are masked; their storage must be finite.
Forward keeps the log-sum-exp of a row, from which backward rebuilds the probabilities (Dao et al., FlashAttention,
2022); dK and dV are added to buffers tile by tile, last tile first (FlexLLM's token-level backward).

Rows of the heads that share a key-value head are folded into one matrix, position by position, so that the rows of
consecutive positions are consecutive and one mask serves every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from coserve_engine.numerics import Numerics

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(q [B, KVH, M, D], k and v [B, KVH, L, D], mask [B or 1, 1, M, L]) -> o [B, KVH, M, D], lse [B, KVH, M]."""
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(do, q, k, v, o, lse, mask), shaped as above -> dq, dk, dv."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys the folded rows of a tile see, the same for every tile when keys are counted from its end.

    Args:
        bias: [tile * G + row_multiple, W] of 0 and -inf, added to the scores of the last keys; W covers the longest
            range. Row r * G + g is head g of the tile's row r; rows past the tile are padding and repeat its last.
        reach: keys before the tile's end that any of its rows may see, a multiple of the tile; None: all.
        group: query heads of one key-value head.
        singles: [1, 1, padded group, W] of each row of the tile alone, views into `bias`: decode asks for them often.
    """

    bias: torch.Tensor
    reach: int | None
    group: int
    singles: tuple[torch.Tensor, ...]

    @classmethod
    def create(
        cls, numerics: Numerics, group: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Mask:
        """Rows see the keys up to their own; with a window, only the last `window` of those (as Mistral's). `length`:
        positions of the longest sequence.
        """
        tile = numerics.tile
        (reach,) = numerics.reaches([window])
        width = numerics.tiles(length) * tile
        row = torch.arange(tile * group + numerics.row_multiple, device=device) // group
        row = row.clamp_(max=tile - 1).unsqueeze(1)
        key = torch.arange(tile - (width if reach is None else min(reach, width)), tile, device=device)
        hidden = key > row if window is None else (key > row) | (key <= row - window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        singles = bias[None, None].unfold(2, numerics.pad(group), group).transpose(-1, -2).unbind(2)
        return cls(bias, reach, group, singles[:tile])

    def first_key(self, tile_end: int) -> int:
        """The first position, a tile's first, that rows of the tile which ends at `tile_end` may see."""
        return 0 if self.reach is None else max(0, tile_end - self.reach)

    def part(self, first: int, rows: int, keys: int) -> torch.Tensor:
        """[1, 1, rows, keys] for folded `rows` from the tile's row `first`, and the `keys` up to the tile's end."""
        start = first * self.group
        return self.bias[start : start + rows, self.bias.shape[1] - keys :][None, None]

    def single(self, first: int, keys: int) -> torch.Tensor:
        """`part` of one row: [1, 1, padded group, keys]."""
        return self.singles[first].narrow(3, self.bias.shape[1] - keys, keys)


def reference_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, in the mask's dtype: see `Forward`."""
    q, k, v = (x.to(mask.dtype) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).mul_(1.0 / math.sqrt(q.shape[-1])).add_(mask)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def reference_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its derivative, from the log-sum-exp: see `Backward`."""
    do, q, k, v, o = (x.to(mask.dtype) for x in (do, q, k, v, o))
    scale = 1.0 / math.sqrt(q.shape[-1])
    p = (q @ k.transpose(-1, -2)).mul_(scale).add_(mask).sub_(lse.unsqueeze(-1)).exp_()
    delta = (do * o).sum(-1, keepdim=True)
    ds = (do @ v.transpose(-1, -2)).sub_(delta).mul_(p).mul_(scale)
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do


def cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention for CPUs, which holds no scores: see `Forward`."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    return o, lse


def cpu_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `cpu_forward`."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(do, q, k, v, o, lse, 0.0, False, attn_mask=mask)
    return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of tiles by one implementation."""

    numerics: Numerics
    forward: Forward
    backward: Backward
    name: str

    @classmethod
    def select(cls, numerics: Numerics, device: torch.device) -> Attention:
        """torch's CPU kernel on a CPU, the definition elsewhere."""
        if device.type == "cpu":
            return cls(numerics, cpu_forward, cpu_backward, "torch's flash kernel for CPUs")
        return cls(numerics, reference_forward, reference_backward, "plain products")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of consecutive rows of a tile.

        Args:
            q: [R, H, D] rotated queries.
            k, v: [KVH, L, D] with L a multiple of the tile, from the mask's first key to the tile's end.
            mask: of the layer.
            first: index of the first row within its tile.

        Returns:
            o [R, H, D] and the log-sum-exp [R, H].
        """
        folded = self._fold(q, k.shape[0])
        o, lse = self.forward(folded, k[None], v[None], mask.part(first, folded.shape[2], k.shape[1]))
        return _unfold(o, q.shape), _unfold(lse.unsqueeze(-1), (*q.shape[:2], 1)).squeeze(-1)

    def attend_singles(
        self, q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], mask: Mask, firsts: tuple[int, ...]
    ) -> torch.Tensor:
        """Attention of one row of each of n sequences (decode): q [n, H, D] -> o [n, H, D].

        The same products as `attend` of each row, folded and padded for all of them at once; `keys` are keys and
        values [1, KVH, L, D] of each sequence.
        """
        n, heads, size = q.shape
        kv_heads = keys[0][0].shape[1]
        group = heads // kv_heads
        folded = q.view(n, kv_heads, group, size)
        padded = self.numerics.pad(group)
        if padded != group:
            folded = torch.cat([folded, q.new_zeros(n, kv_heads, padded - group, size)], 2)
        parts = []
        for rows, first, (k, v) in zip(folded.unsqueeze(1).unbind(), firsts, keys, strict=True):
            parts.append(self.forward(rows, k, v, mask.single(first, k.shape[2]))[0])
        return torch.cat(parts)[:, :, :group].reshape(n, heads, size)

    def attend_backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> torch.Tensor:
        """Backward of `attend` for the first R rows of a tile.

        Args:
            do, q, o: [R, H, D]; lse: [R, H]; k, v: [KVH, L, D] and mask as in forward.
            dk, dv: [KVH, R', D], the gradients of those of the L keys that are rows of the pass; these rows' share is
                added in place.

        Returns:
            dq [R, H, D].
        """
        kv_heads = k.shape[0]
        folded = [self._fold(rows, kv_heads) for rows in (do, q, o, lse.unsqueeze(-1))]
        part = mask.part(0, folded[0].shape[2], k.shape[1])
        dq, more_dk, more_dv = self.backward(folded[0], folded[1], k[None], v[None], folded[2], folded[3][..., 0], part)
        real = min(k.shape[1], dk.shape[1])
        dk[:, :real] += more_dk[0, :, :real]
        dv[:, :real] += more_dv[0, :, :real]
        return _unfold(dq, q.shape)

    def _fold(self, rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[R, H, D] -> [1, KVH, M, D]: row r * G + g is head g of row r, then zeros up to the row multiple."""
        count, _, size = rows.shape
        folded = rows.view(count, kv_heads, -1, size).transpose(0, 1).reshape(1, kv_heads, -1, size)
        padding = self.numerics.pad(folded.shape[2]) - folded.shape[2]
        return torch.cat([folded, rows.new_zeros(1, kv_heads, padding, size)], 2) if padding else folded


def _unfold(folded: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `_fold`: [1, KVH, M, D] -> `shape` (R, H, D)."""
    rows, heads, size = shape
    kv_heads = folded.shape[1]
    real = folded[0, :, : rows * heads // kv_heads]
    return real.reshape(kv_heads, rows, -1, size).transpose(0, 1).reshape(shape)
