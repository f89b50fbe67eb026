"""Attention's derivative, unit by unit, against autograd's of the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bounds import EPSILON
from paged import Pool, attention, staged, within

from coserve_engine.kernels.triton import attention_backward as kernels
from coserve_engine.kernels.triton.attention_backward import UnitTiles
from coserve_engine.kernels.triton.attention_parts import Heads
from coserve_engine.kernels.triton.attention_tables import PassTables, put_pass
from coserve_engine.layout.passes import PassLayout
from coserve_engine.numerics import Numerics


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass and its rows [rows, heads, D]; `true`, of float64: dq, then dk and dv [KVH, rows, D]. `sizes`, likewise:
    sums of the sizes of what each element is summed from.
    """

    layout: PassLayout
    pool: Pool
    tables: PassTables
    of: Heads
    q: torch.Tensor
    do: torch.Tensor
    o: torch.Tensor
    lse: torch.Tensor
    true: tuple[torch.Tensor, ...]
    sizes: tuple[torch.Tensor, ...]

    @classmethod
    def of_lengths(
        cls,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        size: int,
        window: int | None,
        dtype: torch.dtype,
        page: int = 64,
    ) -> Pass:
        """Lengths are multiples of the row multiple."""
        numerics = Numerics(page=page)
        pool = Pool.drawn(lengths, kv_heads, size, dtype, numerics)
        pages = tuple(page for table in pool.pages for page in table)
        layout = PassLayout.of([[0] * length for length in lengths], pages, numerics, training=True)
        tables = staged(lambda columns: put_pass(layout, columns))
        g = torch.Generator().manual_seed(3)
        q, do = (torch.randn(layout.rows, heads, size, generator=g).to(dtype) for _ in range(2))
        parts = []
        for keys, values, rows, dout in zip(pool.keys, pool.values, q.split(lengths), do.split(lengths), strict=True):
            parts.append(derivative(rows, keys, values, dout, window))
        o, lse, dq, q_size = (torch.cat([part[n] for part in parts]) for n in (0, 1, 2, 5))
        dk, dv, k_size, v_size = (torch.cat([part[n] for part in parts], 1) for n in (3, 4, 6, 7))
        of = Heads(heads, kv_heads, size, numerics.tile, page, window, hopper=True)
        true, sizes = (dq, dk, dv), (q_size, k_size, v_size)
        return cls(layout, pool, tables, of, q, do, o.to(dtype), lse.float(), true, sizes)

    def backward(self, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """dq [rows, heads, D] and dkv of units that end where the tiles `cuts` begin, last first."""
        dq = torch.empty_like(self.q)
        dkv = torch.zeros(2, self.of.kv_heads, self.layout.rows, self.of.size)
        spans, end = self.layout.spans, len(self.layout.spans)
        for first in [*cuts, 0]:
            rows = slice(spans[first].start, spans[end - 1].stop)
            dq[rows] = kernels.backward(
                self.q[rows].contiguous(),
                self.do[rows].contiguous(),
                self.o,
                self.lse,
                dkv,
                self.pool.k,
                self.pool.v,
                self.tables,
                UnitTiles(first, end, spans[first].index),
                self.of,
            )
            end = first
        return dq, dkv

    def check(self, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        dq, (dk, dv) = found
        for part, true, size in zip((dq, dk, dv), self.true, self.sizes, strict=True):
            within(part, true, size, (1 if self.q.dtype == torch.bfloat16 else 6) * EPSILON[self.q.dtype])


def derivative(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, ...]:
    """o, lse, dq, dk, dv of a whole sequence, and of the last three the sums of their terms' sizes."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = attention(*wide, 0, window)
    grads = torch.autograd.grad(o, wide, do.double())
    group, scale = q.shape[1] // k.shape[0], q.shape[2] ** -0.5
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    row, key = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[1])
    hidden = key > row if window is None else (key > row) | (key <= row - window)
    scores = torch.einsum("rhd,hld->hrl", q.double(), k) * scale
    p = (scores - lse.detach().T[:, :, None]).exp().masked_fill(hidden, 0)
    both = torch.einsum("rhd,hld->hrl", do.double().abs(), v.abs())
    ds = p * (both + (do.double().abs() * o.detach().abs()).sum(-1).T[:, :, None]) * scale

    def folded(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, group, *x.shape[1:]).sum(1)

    sizes = (
        torch.einsum("hrl,hld->rhd", ds, k.abs()),
        folded(torch.einsum("hrl,rhd->hld", ds, q.double().abs())),
        folded(torch.einsum("hrl,rhd->hld", p, do.double().abs())),
    )
    return o.detach(), lse.detach(), *grads, *sizes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "page"),
    [(4, 2, 16, None, 64), (3, 1, 24, 70, 16), (2, 2, 64, 1, 32), (7, 1, 16, 64, 16), (2, 1, 96, None, 64)],
)
def test_gradients(dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None, page: int) -> None:
    made = Pass.of_lengths([132, 64, 20], heads, kv_heads, size, window, dtype, page)
    made.check(made.backward([2]))


@pytest.mark.parametrize("window", [None, 50])
def test_how_units_cut_a_pass_changes_no_bit(dtype: torch.dtype, window: int | None) -> None:
    made = Pass.of_lengths([200, 68], 2, 1, 16, window, dtype)
    whole = made.backward([])
    made.check(whole)
    for cuts in ([2], [5, 4, 3, 2, 1]):
        assert all(torch.equal(a, b) for a, b in zip(whole, made.backward(cuts), strict=True))


def test_tiles_in_another_order_would_change_bits() -> None:
    """The control: units first to last."""
    made = Pass.of_lengths([200], 1, 1, 16, None, torch.float32)
    dkv, (_, whole) = torch.zeros(2, 1, 200, 16), made.backward([])
    for first, span in enumerate(made.layout.spans):
        rows, unit = slice(span.start, span.stop), UnitTiles(first, first + 1, span.index)
        q, do = made.q[rows].contiguous(), made.do[rows].contiguous()
        kernels.backward(q, do, made.o, made.lse, dkv, made.pool.k, made.pool.v, made.tables, unit, made.of)
    assert torch.allclose(dkv, whole, atol=1e-4)
    assert not torch.equal(dkv, whole)


@pytest.mark.parametrize(("size", "page"), [(16, 64), (144, 16)])
def test_keys_of_half_a_tile_at_once(size: int, page: int) -> None:
    """As on a device before Hopper."""
    made = Pass.of_lengths([132], 2, 1, size, 70, torch.float32, page)
    older = replace(made, of=replace(made.of, hopper=False))
    older.check(older.backward([1]))


def test_no_two_programs_touch_one_address(raced: Any) -> None:
    made = Pass.of_lengths([132, 20], 4, 2, 16, 70, torch.float32, 16)
    made.check(raced(lambda: made.backward([1])))


def test_a_layer_of_a_real_model(dtype: torch.dtype) -> None:
    made = Pass.of_lengths([72], 32, 8, 128, None, dtype)
    made.check(made.backward([]))


def test_every_row_reaches_every_key_of_its_window() -> None:
    """Each probability of a long sequence counts, however small: dv of equal weights is a sum over rows, exactly."""
    rows, window = 640, 256
    made = Pass.of_lengths([rows], 1, 1, 16, window, torch.float32)
    pool = Pool.of([torch.zeros(1, rows, 16)], [torch.zeros(1, rows, 16)], made.pool.numerics)
    lse = torch.zeros(rows, 1)  # each weight is one
    do = torch.zeros(rows, 1, 16)
    do[:, 0, 0], do[:, 0, 1] = 1, torch.arange(rows)
    zero = torch.zeros_like(do)
    alone = replace(made, pool=pool, q=zero, do=do, o=zero, lse=lse)
    _, (dk, dv) = alone.backward([7, 3])
    first = torch.arange(rows)
    last = (first + window - 1).clamp(max=rows - 1)
    assert torch.equal(dv[0, :, 0], (last - first + 1).float())
    assert torch.equal(dv[0, :, 1], ((first + last) * (last - first + 1) / 2).float())
    assert not bool(dk.any())


@pytest.mark.parametrize("broken", ["window", "page", "end", "scale"])
def test_what_is_broken_is_seen(broken: str) -> None:
    made = Pass.of_lengths([132, 20], 2, 1, 16, 50, torch.float32, 16)
    tables = made.tables
    wrong = {
        "window": replace(made, of=replace(made.of, window=51)),
        "page": replace(made, tables=tables._replace(pages=tables.pages.roll(1))),
        "end": replace(made, tables=tables._replace(tiles=tables.tiles - torch.tensor([0, 0, 0, 0, 1, 0]))),
        "scale": replace(made, q=made.q * 1.001),
    }
    with pytest.raises(AssertionError):
        made.check(wrong[broken].backward([]))
