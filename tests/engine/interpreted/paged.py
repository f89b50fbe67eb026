"""Sequences in scattered pages with NaN behind their ends, and attention over them in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.numerics import Numerics

T = TypeVar("T")


def staged(put: Callable[[Columns], Callable[[Staged], T]]) -> T:
    """What a function that puts columns gives, with something before them."""
    columns = Columns()
    columns.ints(range(3))
    made = put(columns)
    return made(Staged(torch.tensor(columns.all_ints), torch.tensor(columns.all_floats, dtype=torch.float64)))


@dataclass(frozen=True, slots=True)
class Pool:
    """Keys and values [KVH, places, D] of sequences with these pages, and each sequence's own [KVH, length, D]."""

    numerics: Numerics
    k: torch.Tensor
    v: torch.Tensor
    pages: tuple[tuple[int, ...], ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], numerics: Numerics, seed: int = 0
    ) -> Pool:
        """All that is no sequence's is NaN, the null page too."""
        need = [numerics.pages(own.shape[1]) for own in keys]
        order = (1 + torch.randperm(sum(need) + 2, generator=torch.Generator().manual_seed(seed))).tolist()
        kv_heads, _, size = keys[0].shape
        shape, page = (kv_heads, (len(order) + 1) * numerics.page, size), numerics.page
        k, v = (torch.full(shape, float("nan"), dtype=keys[0].dtype) for _ in range(2))
        tables = []
        for own, its, count in zip(keys, values, need, strict=True):
            table, order = tuple(order[:count]), order[count:]
            tables.append(table)
            at = torch.tensor(table).mul_(page).unsqueeze(1).add(torch.arange(page)).flatten()[: own.shape[1]]
            k[:, at], v[:, at] = own, its
        return cls(numerics, k, v, tuple(tables), tuple(keys), tuple(values))

    @classmethod
    def drawn(
        cls, lengths: Sequence[int], kv_heads: int, size: int, dtype: torch.dtype, numerics: Numerics, seed: int = 0
    ) -> Pool:
        g = torch.Generator().manual_seed(seed)
        keys, values = ([torch.randn(kv_heads, n, size, generator=g).to(dtype) for n in lengths] for _ in range(2))
        return cls.of(keys, values, numerics, seed)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows q [R, heads, D] from position `first` of a sequence with k, v [KVH, L, D], differentiable -> o [R, heads, D]
    and the natural log-sum-exp [R, heads].
    """
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    row, key = torch.arange(first, first + q.shape[0])[:, None], torch.arange(k.shape[1])
    hidden = key > row if window is None else (key > row) | (key <= row - window)
    scores = (torch.einsum("rhd,hld->rhl", q.double(), k) / math.sqrt(q.shape[-1])).masked_fill(
        hidden[:, None], -math.inf
    )
    return torch.einsum("rhl,hld->rhd", torch.softmax(scores, -1), v), torch.logsumexp(scores, -1)


def within(found: torch.Tensor, true: torch.Tensor, summed: torch.Tensor, epsilon: float) -> None:
    """Each element is within `epsilon` of the size of what was summed for it: the sum of its terms' sizes."""
    assert not bool(found.isnan().any())
    worst = float(((found.double() - true).abs() / summed.clamp(min=1e-30)).max())
    assert worst <= epsilon, f"{worst:.1e}"
